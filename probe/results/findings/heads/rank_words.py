"""What the table `heads` says: how much of their width heads use by their weights, and how much on the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rc_probe.results.protocols import Result
from rc_probe.results.words import many, number

if TYPE_CHECKING:
    import pandas as pd

LIKE = 0.5  # of the largest cosine with ±I that a head can have: from here on it is called nearest-like or farthest-like


def by_head(frame: pd.DataFrame, circuit: str, metric: str) -> pd.Series:
    """The values of one metric, of single heads, indexed by block and head."""
    rows = frame[(frame["circuit"] == circuit) & (frame["metric"] == metric) & frame["head"].notna()]
    return rows.set_index(["block", "head"])["value"]


def judge_heads(result: Result) -> dict[str, Any] | None:
    """How many dimensions heads use of their width, by their weights and on the data."""
    frame = result.declared["heads"].read(result.tables)
    facts = result.model.get("heads") or {}
    ranks = by_head(frame, "qk", "effective_rank")
    if ranks.empty:
        return None
    scores = by_head(frame, "qk", "logits_r90")
    width = facts.get("width", "their")
    sentence = (
        f"By their weights the queries and keys of {many(len(ranks), 'heads')} use {_span(ranks)} of {width} dimensions "
        "(effective rank)"
    )
    if not scores.empty:
        sentence += f"; on this data {_span(scores)} hold 90 % of what their scores tell apart"
    return {"sentence": f"{sentence}.", "reasons": [*_like(frame), *_bottleneck(frame, facts)]}


def _span(values: pd.Series) -> str:
    low, high = number(float(values.min())), number(float(values.max()))
    return low if low == high else f"{low} to {high}"


def _like(frame: pd.DataFrame) -> list[str]:
    near = by_head(frame, "qk", "identity")
    counts = int((near > LIKE).sum()), int((near < -LIKE).sum())
    if not any(counts):
        return [
            f"No head looks for the nearest or the farthest token: the cosine of its form with ±I is at most "
            f"{number(float(near.abs().max()))} of what a head so wide can reach."
        ]
    return [
        f"Nearest-like heads (form near cI, c > 0): {counts[0]}; farthest-like ones (c < 0): {counts[1]}."
    ]


def _bottleneck(frame: pd.DataFrame, facts: dict[str, Any]) -> list[str]:
    narrow = by_head(frame, "qk", "bottleneck")
    if narrow.empty or not narrow.any():
        return []
    return [
        f"Heads of width {facts.get('width')} are narrower than the longest sample ({facts.get('context')} tokens): their scores "
        "are of lower rank than the matrix that they fill (low-rank bottleneck)."
    ]
