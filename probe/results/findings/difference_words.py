"""What a difference of two models says: how far apart the streams are, from which layer on, and whose doing it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rc_probe.results.words import number, signed

if TYPE_CHECKING:
    import pandas as pd

    from rc_probe.results.protocols import Differing

KINDS = {
    "attention": "attention branch",
    "cross": "cross-attention branch",
    "mixer": "mixer",
    "mlp": "MLP branch",
}


def by_place(frame: pd.DataFrame, component: str, metric: str) -> dict[int, float]:
    """The means of a metric by layer of the stream, or by block of a part; those that are known."""
    rows = frame[(frame["component"] == component) & (frame["metric"] == metric) & frame["mean"].notna()]
    places = rows["layer" if component == "stream" else "block"]
    return {int(at): float(mean) for at, mean in zip(places, rows["mean"], strict=True)}


def stream_metric(frame: pd.DataFrame) -> str | None:
    """The metric that speaks for the streams: the relative difference of the bulk, else CKA of the bulk."""
    there = set(frame.loc[frame["component"] == "stream", "metric"])
    return next((name for name in ("difference_bulk", "cka_bulk") if name in there), None)


def judge_difference(result: Differing) -> dict[str, Any]:
    """sentence, reasons; metric, value at the last layer, first: the first layer over the threshold, or None."""
    frame = result.tables["differences"]
    a, b = str(result.a.get("name")), str(result.b.get("name"))
    metric = stream_metric(frame)
    found: dict[str, Any] = {
        "metric": metric,
        "value": None,
        "first": None,
        "threshold": result.settings.get("threshold"),
    }
    reasons = []
    if metric is None:
        sentence = f"No stream of {a} and {b} was compared."
    else:
        curve = by_place(frame, "stream", metric)
        away = {layer: 1 - value for layer, value in curve.items()} if metric == "cka_bulk" else curve
        limit = float(found["threshold"] or math.inf)
        found["value"] = curve[max(curve)]
        found["first"] = next((layer for layer in sorted(away) if away[layer] > limit), None)
        sentence = _sentence(metric, away, curve, a, b)
        reasons.append(_first(found["first"], away, limit, metric))
    reasons += _parts(frame)
    reasons += _predictions(result.settings.get("predictions"), a, b)
    return {"sentence": sentence, "reasons": reasons, **found}


def _sentence(metric: str, away: Mapping[int, float], curve: Mapping[int, float], a: str, b: str) -> str:
    last, worst = max(curve), max(away, key=lambda layer: away[layer])
    if not any(away.values()):
        return f"0 everywhere: the streams of {b} are those of {a}."
    if metric == "cka_bulk":
        return f"{number(curve[last])} linear CKA of {b} and {a} at the last layer; the lowest is {number(curve[worst])}, at layer {worst}."
    more = "" if worst == last else f"; the largest is {number(away[worst])}, at layer {worst}"
    return f"{number(curve[last])} relative difference of {b} from {a} at the last layer{more}."


def _first(first: int | None, away: Mapping[int, float], limit: float, metric: str) -> str:
    what = "1 − CKA" if metric == "cka_bulk" else "The relative difference"
    if first is None:
        return f"{what} is at most {number(limit)} at every layer."
    return f"{what} is first over {number(limit)} at layer {first}: {number(away[first])}."


def _parts(frame: pd.DataFrame) -> Iterator[str]:
    """Which block and which branch differ most on the same inputs."""
    blocks = by_place(frame, "block", "sensitivity_bulk")
    if not blocks:
        return
    if not any(blocks.values()):
        yield "On the same inputs every block gives the same."
        return
    most = max(blocks, key=lambda at: blocks[at])
    share = blocks[most] ** 2 / sum(value**2 for value in blocks.values())
    yield (
        f"On the same inputs block {most} differs most: {number(blocks[most])} of the stream behind it "
        f"({share:.0%} of the squares of all blocks)."
    )
    branches = {
        (kind, at): value for kind in KINDS for at, value in by_place(frame, kind, "sensitivity_bulk").items()
    }
    if branches and any(branches.values()):
        kind, at = max(branches, key=lambda key: branches[key])
        yield f"Of the branches it is the {KINDS[kind]} of block {at}: {number(branches[kind, at])} of the stream that it is added to."


def _predictions(found: Mapping[str, Any] | None, a: str, b: str) -> Iterator[str]:
    if not found:
        return
    agreement = found.get("agreement")
    if agreement:
        yield f"{b} gives the answer of {a} in {agreement['b']:.1%} of its predictions ({found['task']})."
    loss = found.get("loss")
    if loss:
        known = loss.get("low") is not None and loss.get("high") is not None
        span = f", 95 % interval {signed(loss['low'])} to {signed(loss['high'])}" if known else ""
        yield (
            f"The loss is {number(loss['b'], 3)} nats, that of {a} {number(loss['a'], 3)} "
            f"({signed(loss['b'] - loss['a'])}{span})."
        )
