"""What truncation says: what less rank costs, how small each head could be, and what the theory does and does not add."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rc_probe.results.findings.importance_words import SUBJECTS, UNITS, criterion
from rc_probe.results.protocols import Result
from rc_probe.results.words import number, signed

if TYPE_CHECKING:
    import pandas as pd

METHODS = {
    "weights": "by the weights", "data": "by the data", "bottom": "smallest directions (control)",
    "random": "random directions (control)",
}  # fmt: skip


def of_all(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of one metric with all heads of the model at one rank."""
    return frame[frame["block"].isna() & frame["rank"].notna() & (frame["metric"] == metric)]


def judge_truncation(result: Result) -> dict[str, Any] | None:
    """What a quarter of the rank costs, by weights and by data."""
    frame = result.declared["truncation"].read(result.tables)
    facts = result.model.get("truncation") or {}
    metric = criterion(frame)
    if metric is None or not facts:
        return None
    rows = of_all(frame, metric)
    rank = _quarter(rows, int(facts["width"]))
    if rank is None:
        return None
    here = rows[rows["rank"] == rank]
    cost = dict(zip(here["method"].tolist(), here["change"].tolist(), strict=True))
    unit, subject = UNITS.get(metric, ""), SUBJECTS[metric]
    parts = [f"{signed(cost[m])}{unit} {METHODS[m]}" for m in METHODS if m in cost]
    sentence = f"With rank {rank} of {facts['width']} in every head {subject} changes by {', '.join(parts)}."
    reasons = [
        *_smallest(frame, facts, metric), *_collapse(result, rank), *_found(frame, rank), *_bounds(facts)
    ]  # fmt: skip
    return {"sentence": sentence, "metric": metric, "rank": rank, "reasons": reasons}


def _quarter(rows: pd.DataFrame, width: int) -> int | None:
    """The largest measured rank up to a quarter of the width; else the least."""
    ranks = sorted({int(rank) for rank in rows["rank"]})
    return max((rank for rank in ranks if 4 * rank <= width), default=min(ranks, default=None))


def _smallest(frame: pd.DataFrame, facts: dict[str, Any], metric: str) -> list[str]:
    """How many heads could be smaller, and what they cost at once."""
    rows = frame[frame["metric"] == "smallest_rank"]
    if rows.empty:
        return []
    width, unit = int(facts["width"]), UNITS.get(metric, "")
    counts = Counter(int(rank) for rank in rows["value"].tolist())
    sizes = ", ".join(f"{counts[rank]} of rank {rank}" for rank in sorted(counts) if rank < width)
    kept = int((rows["value"] == width).sum())
    found = [
        f"Heads that alone cost at most {number(float(facts['tolerance']))}{unit}, by the data, of {len(rows)}: {sizes or 'none'}; "
        f"{kept} need more than every rank that was measured."
    ]
    joint = {row["metric"]: row for row in frame[frame["method"] == "smallest"].to_dict("records")}
    if metric in joint and "parameters" in joint:
        weights = joint["parameters"]
        found.append(
            f"All of them at their smallest ranks at once: {SUBJECTS[metric]} changes by "
            f"{signed(joint[metric]['change'])}{unit}, with {int(weights['value']):,} weights of queries and keys in place of "
            f"{int(weights['baseline']):,}"
            + (" (each head with keys of its own, which groups share now)." if facts.get("grouped") else ".")
        )
    return found


def _collapse(result: Result, rank: int) -> list[str]:
    """Whether less rank is faster collapse of pure attention: at the layer where the two are furthest apart."""
    rows = result.declared["truncation_curves"].read(result.tables)
    rows = rows[
        (rows["network"] == "SAN") & (rows["method"] == "weights") & (rows["rank"] == rank)
        & (rows["metric"] == "residual_bulk") & (rows["layer"] > 0) & (rows["value"] > 0) & (rows["baseline"] > 0)
    ]  # fmt: skip
    if rows.empty:
        return []
    row = max(rows.to_dict("records"), key=lambda each: each["baseline"] / each["value"])
    if row["value"] >= row["baseline"]:
        return [f"Pure attention (SAN) collapses no faster with rank {rank} at any layer."]
    return [
        f"Less rank, flatter attention, faster collapse: at layer {int(row['layer'])} the residual of pure attention (SAN) is "
        f"{number(float(row['value']))} with rank {rank} by the weights, {number(float(row['baseline']))} with full rank."
    ]


def _found(frame: pd.DataFrame, rank: int) -> list[str]:
    rows = frame[(frame["metric"] == "retrieval") & (frame["rank"] == rank)]
    share = rows.groupby("method")["value"].mean()
    if "data" not in share or "weights" not in share:
        return []
    return [
        f"The token that a whole head finds best is found with rank {rank} in {number(100 * share['data'])} % of cases by the data, "
        f"{number(100 * share['weights'])} % by the weights (mean over the heads of the named blocks)."
    ]


def _bounds(facts: dict[str, Any]) -> list[str]:
    """What is measured and what is theory."""
    heads, width, dim, tokens = (facts[name] for name in ("heads", "width", "dim", "context"))
    return [
        f"Measured: {heads} heads of width {width} in a stream of {dim}, on up to {tokens} tokens, truncated after training. Theory, for one toy target "
        f"(nearest neighbour, one layer; Amsel et al. 2024): a head of rank far below {dim} cannot be replaced by more heads of that rank, unless there are "
        "exponentially many. What this model would learn with other widths is neither."
    ]
