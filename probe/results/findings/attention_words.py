"""What the tables say of the model's own attention: its sinks, its mask, the side of β_c that its heads are on."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from rc_probe.results.findings.massive_words import groups
from rc_probe.results.protocols import Result
from rc_probe.results.words import many, number

SINK = 0.3
SHOWN = 3  # groups of sinks in the sentence
MOST = 0.5  # share of the samples in which a head has a sink


def heads_of(frame: pd.DataFrame, metric: str, component: str = "attention") -> pd.DataFrame:
    """The rows of single heads of one metric of the table `attention`."""
    rows = frame[(frame["metric"] == metric) & (frame["component"] == component)]
    return rows[rows["head"].notna() & rows["mean"].notna()]


def judge_attention(result: Result) -> dict[str, Any] | None:
    """How many heads send most of their attention to one token, and to which."""
    frame = result.declared["attention"].read(result.tables)
    sinks = result.declared["attention_sinks"].read(result.tables)
    parts = {str(name): rows for name, rows in frame[frame["head"].notna()].groupby("component", sort=False)}
    if not parts:
        return None
    told = [_sinks(frame, sinks, component) for component in parts]
    reasons = []
    if len(sinks):
        reasons.append(
            "A sink is no defect: many trained models put attention there when a head needs no other token."
        )
    reasons += [*_certificate(result), *_sides(frame)]
    share = heads_of(frame, "sink_share")["mean"]
    return {
        "sentence": " ".join(filter(None, told)) or "No token could be told to be a sink: the samples are too short.",
        "reasons": reasons,
        "heads": len(share),
        "heads_with_sink": int((share >= MOST).sum()),
    }  # fmt: skip


def key_numbers(frame: pd.DataFrame, masks: pd.DataFrame | None) -> dict[str, int | float]:
    """Of one run by their headings; NaN where one was not measured."""
    share, phase = (heads_of(frame, name)["mean"] for name in ("sink_share", "phase"))
    kept = [] if masks is None else masks["product"].dropna().tolist()
    return {
        "heads": len(heads_of(frame, "entropy")),
        "with a sink": int((share >= MOST).sum()),
        "entropy": float(heads_of(frame, "entropy")["mean"].mean()),
        "over β_c": int((phase > 1).sum()),
        "kept by the product of all patterns": float(kept[-1]) if kept else math.nan,
    }


def _sinks(frame: pd.DataFrame, sinks: pd.DataFrame, component: str) -> str:
    rows = heads_of(frame, "sink_share", component)
    if rows.empty:
        return ""
    having = rows[rows["mean"] >= MOST]
    of = many(len(rows), "heads") if component == "attention" else f"{len(rows)} cross-attention heads"
    if having.empty:
        return f"None of {of} gives over {SINK} of its attention to one token."
    keys = list(zip(having["block"], having["head"], strict=True))
    mine = sinks[(sinks["component"] == component)]
    mine = mine[[key in set(keys) for key in zip(mine["block"], mine["head"], strict=True)]]
    found = [_group(name, own) for name, own in groups(mine)]
    more = len(found) - SHOWN
    others = f"; and {many(more, 'other tokens')}" if more > 0 else ""
    verb = "gives" if len(having) == 1 else "give"
    return f"{len(having)} of {of} {verb} over {SINK} of their attention to one token: {'; '.join(found[:SHOWN])}{others}."


def _group(name: str, rows: pd.DataFrame) -> str:
    """`position 1 in 190 heads, blocks 2 to 30, up to 0.98`."""
    heads = len(rows[["block", "head"]].drop_duplicates())
    low, high = int(rows["block"].min()), int(rows["block"].max())
    blocks = f"block {low}" if low == high else f"blocks {low} to {high}"
    return f"{name} in {many(heads, 'heads')}, {blocks}, up to {number(float(rows['attention'].max()))}"


def _certificate(result: Result) -> list[str]:
    """What the product of the patterns keeps, beside what the theorem promises."""
    frame = result.declared["attention_masks"].read(result.tables)
    frame = frame[frame["product"].notna()]
    if frame.empty:
        return []
    last = frame.iloc[-1]
    chained = f"Multiplied over all {many(len(frame), 'blocks')}" if len(frame) > 1 else "In its one block"
    sentence = (
        f"{chained}, the head-averaged patterns keep at most {number(last['product'])} of what two tokens differ by "
        f"(Dobrushin coefficient); {_promised(last)}."
    )
    return [sentence, *_graph(frame)]


def _promised(last: pd.Series) -> str:
    bound = float(last["bound"])
    if bool(last["vacuous"]):
        return f"the theorem for masks is vacuous here: {last['reason']}"
    return f"the theorem for masks promises {number(bound)} or less"


def _graph(frame: pd.DataFrame) -> list[str]:
    """The mask in words, one for each that there is."""
    told: list[str] = []
    for _, rows in frame.groupby(["edges", "centers", "radius"], sort=False, dropna=False):
        tokens, blocks = int(rows["tokens"].iloc[0]), many(len(rows), "blocks")
        edges, centers, radius = (rows[name].iloc[0] for name in ("edges", "centers", "radius"))
        if pd.isna(radius):
            told.append(f"{blocks}: no token reaches all others")
            continue
        who = "every token is a center" if centers == tokens else many(int(centers), "centers")
        told.append(f"{blocks}: {number(100 * edges)} % of all pairs, {who}, radius {int(radius)}")
    return [f"The mask, on {many(int(frame['tokens'].iloc[0]), 'tokens')}: {'; '.join(told)}."]


def _sides(frame: pd.DataFrame) -> list[str]:
    """On which side of β_c the heads are."""
    rows = heads_of(frame, "phase")
    if rows.empty:
        return []
    over = int((rows["mean"] > 1).sum())
    low, high = number(float(rows["mean"].min())), number(float(rows["mean"].max()))
    return [
        f"By the variance of their scores {over} of {many(len(rows), 'heads')} are over β_c, on the side of entropy collapse, "
        f"the others on that of rank collapse (β / β_c {low} to {high}; a rule for Gaussian scores)."
    ]
