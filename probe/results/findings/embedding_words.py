"""What the table `embeddings` says: the floor of similarities, how many directions are in use, and which layer finds best."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rc_probe.registry import EMBEDDING_METRICS
from rc_probe.results.protocols import Result
from rc_probe.results.words import number, signed

if TYPE_CHECKING:
    import pandas as pd

QUALITIES = ("accuracy", "spearman")  # of retrieval
TITLES = {"accuracy": "Retrieval accuracy", "spearman": "Rank correlation with the given similarity"}


def by_layer(frame: pd.DataFrame, metric: str, column: str = "value") -> dict[int, float]:
    """A column of the table `embeddings` by layer, of one metric."""
    rows = frame[frame["metric"] == metric]
    return {int(layer): float(value) for layer, value in zip(rows["layer"], rows[column], strict=True)}


def own(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The rows of the model's own embedding, by metric."""
    rows = frame[frame["layer"] == frame["layer"].max()]
    return {
        str(row["metric"]): {str(name): cell for name, cell in row.items()} for row in rows.to_dict("records")
    }


def quality(frame: pd.DataFrame) -> str | None:
    """The metric of retrieval that was measured."""
    return next((name for name in QUALITIES if name in set(frame["metric"])), None)


def title_of(metric: str) -> str:
    """For headings."""
    return TITLES.get(metric) or EMBEDDING_METRICS[metric].title


def judge_embeddings(result: Result) -> dict[str, Any] | None:
    """The cosine that says nothing, the directions in use, and the layer that finds best."""
    frame = result.declared["embeddings"].read(result.tables)
    facts = result.model.get("embeddings") or {}
    found = own(frame)
    cosine = found.get("embedding_cosine")
    if cosine is None:
        return None
    things = str(facts.get("things", "samples"))
    far = found["embedding_cosine_far"]["value"]
    spread = f"standard deviation {number(cosine['std'])}, " if math.isfinite(cosine["std"]) else ""
    sentence = (
        f"The cosine of two different {things} is {number(cosine['value'])} on average ({spread}95 % of pairs are below "
        f"{number(far)}): a similarity says something only as far as it is above that."
    )
    reasons = [_directions(found, int(cosine["count"]), things), *_retrieval(frame, found, facts, things)]
    return {
        "sentence": sentence,
        "cosine": cosine["value"],
        "far": far,
        "best": facts.get("best"),
        "reasons": reasons,
    }


def _directions(found: dict[str, dict[str, Any]], count: int, things: str) -> str:
    rank = f"RankMe {number(found['rankme']['value'], 3)} (at most {int(found['rankme']['most'])})"
    if "first_component" not in found:
        return f"The embeddings of all {things} are the same up to rounding: {rank}."
    score = found.get("isoscore")
    iso = f"IsoScore {number(score['value'])} (at most {number(score['most'])}), " if score else ""
    share = number(100 * found["first_component"]["value"])
    return f"Directions in use, of {count} {things}: {iso}{rank}; the first principal component has {share} % of the variance."


def _retrieval(
    frame: pd.DataFrame, found: dict[str, dict[str, Any]], facts: dict[str, Any], things: str
) -> list[str]:
    metric, best = quality(frame), facts.get("best")
    if metric is None:
        return []
    title, last = TITLES[metric], int(frame["layer"].max())
    whole = f"{title} by the model’s own embedding: {number(found[metric]['value'])}."
    if not best:
        return [whole, f"Too few {things} to choose a best layer on some and score it on others."]
    if best["layer"] == last:
        return [whole, f"No other layer is better on the {things} that chose."]
    return [whole, _better(best, title, things)]


def _better(best: dict[str, Any], title: str, things: str) -> str:
    change = best["value"] - best["own"]
    ends = [math.nan if best.get(end) is None else float(best[end]) for end in ("low", "high")]
    known = all(map(math.isfinite, ends))
    span = f", {signed(ends[0])} to {signed(ends[1])}" if known else ""
    unclear = ", which so few cannot tell from none" if known and ends[0] <= 0 <= ends[1] else ""
    return (
        f"Best on the {things} that chose: layer {best['layer']} ({number(best['chosen'])}). On {best['count']} others: "
        f"{number(best['value'])}, by the model’s own embedding {number(best['own'])} (change {signed(change)}{span}{unclear})."
    )
