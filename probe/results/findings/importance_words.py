"""What the table `importance` says: which removal costs most and least, and how far proxies see it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rc_probe.registry import METRICS, PATH_METRICS, PROXY, REMOVAL_METRICS
from rc_probe.results.protocols import Result
from rc_probe.results.words import number, signed

CRITERIA = (
    "loss",
    "kl",
    "embedding_distance",
    "residual_bulk",
)  # what a removal is judged by: the first that there is

if TYPE_CHECKING:
    import pandas as pd
SUBJECTS = {
    "loss": "the loss", "kl": "the KL divergence from the whole model",
    "embedding_distance": "the distance from the whole model’s embeddings",
    "residual_bulk": "the residual of the bulk at the last layer",
}  # fmt: skip
UNITS = {"loss": " nats", "kl": " nats"}
FEW = 4  # blocks; a rank correlation of fewer says nothing


@dataclass(frozen=True)
class Ranking:
    """How a proxy ranks parts beside what their removal costs. rho: Spearman's; count: how many parts."""

    component: str
    proxy: str
    rho: float
    count: int


def criterion(frame: pd.DataFrame) -> str | None:
    """The metric that removals are judged by; None without removals."""
    measured = set(frame["metric"])
    return next((metric for metric in CRITERIA if metric in measured), None)


def changes(frame: pd.DataFrame, component: str = "block") -> dict[int, float]:
    """The change of the criterion by block, of the blocks that have it."""
    metric = criterion(frame)
    rows = frame[(frame["component"] == component) & (frame["metric"] == metric) & frame["change"].notna()]
    return {int(block): float(change) for block, change in zip(rows["block"], rows["change"], strict=True)}


def rankings(frame: pd.DataFrame) -> list[Ranking]:
    """Of each component and proxy. A branch's proxies stand beside the removal of the branch."""
    proxies = frame[frame["metric"].str.startswith(PROXY)]
    found = []
    for (component, proxy), rows in proxies.groupby(["component", "metric"], sort=False):
        cost = changes(frame, str(component))
        pairs = [
            (value, cost[int(block)])
            for block, value in zip(rows["block"], rows["value"], strict=True)
            if int(block) in cost
        ]
        rho = _spearman(pairs)
        if math.isfinite(rho):
            found.append(Ranking(str(component), str(proxy), rho, len(pairs)))
    return found


def _spearman(pairs: list[tuple[float, float]]) -> float:
    from scipy.stats import spearmanr

    values, costs = ([one[i] for one in pairs] for i in (0, 1))
    if len(pairs) < FEW or len(set(values)) == 1 or len(set(costs)) == 1:
        return math.nan
    return float(spearmanr(values, costs).statistic)


def judge_importance(result: Result) -> dict[str, Any] | None:
    """The least and the most that the removal of one block costs; nothing of several at once."""
    frame = result.declared["importance"].read(result.tables)
    metric, cost = criterion(frame), changes(frame)
    if metric is None or not cost:
        return None
    most, least = max(cost, key=lambda block: cost[block]), min(cost, key=lambda block: cost[block])
    unit, subject = UNITS.get(metric, ""), SUBJECTS[metric]
    sentence = f"Without block {most} {subject} {_moves(cost[most], unit)}"
    if least != most:
        sentence = f"Without block {least} {subject} {_moves(cost[least], unit)}, without block {most} it {_moves(cost[most], unit)}"
    reasons = ["Each is removed alone: what several cost together is not the sum of these."]
    return {"sentence": f"{sentence}.", "metric": metric, "most": most, "least": least,
            "reasons": reasons + _other_parts(frame, metric) + _proxies(frame, cost, metric)}  # fmt: skip


def _moves(change: float, unit: str) -> str:
    if change == 0:
        return "stays the same"
    return f"{'rises' if change > 0 else 'falls'} by {number(abs(change))}{unit}"


def _other_parts(frame: pd.DataFrame, metric: str) -> list[str]:
    """Of the parts of blocks, and of heads: the one that costs most."""
    rows = frame[(frame["component"] != "block") & (frame["metric"] == metric) & frame["change"].notna()]
    if rows.empty:
        return []
    row = rows.iloc[int(rows["change"].argmax())]
    head = f":{int(row['head'])}" if not math.isnan(row["head"]) else ""
    name = f"{row['component']}@{int(row['block'])}{head}"
    found = [
        f"Of {len(rows)} parts of blocks, {name} costs most: {SUBJECTS[metric]} {_moves(row['change'], UNITS.get(metric, ''))}."
    ]
    if head:
        found.append(
            "The credit of a single head is not identifiable once the output projection has mixed them."
        )
    return found


def _proxies(frame: pd.DataFrame, cost: dict[int, float], metric: str) -> list[str]:
    """How a proxy ranks the blocks, and the block that it is most wrong about."""
    found = rankings(frame)
    if not found:
        return []
    parts = [
        f"{REMOVAL_METRICS[each.proxy].title.lower()} of {_plural(each.component)} {number(each.rho)}"
        for each in found
    ]
    sentences = [f"Rank correlation of proxies with what removals cost: {', '.join(parts)}."]
    influence = {
        int(block): float(value)
        for block, value in frame[frame["metric"] == "proxy_block_influence"][["block", "value"]].itertuples(
            index=False
        )
        if int(block) in cost
    }
    return sentences + _unseen(influence, cost, metric)


def _plural(component: str) -> str:
    return {"block": "blocks", "attention": "attention branches", "mlp": "MLP branches"}.get(
        component, f"{component} branches"
    )


def _unseen(influence: dict[int, float], cost: dict[int, float], metric: str) -> list[str]:
    """The block that ranks much higher by what it costs than by block influence, where there is one."""
    by_cost, by_proxy = (sorted(given, key=lambda block: -given[block]) for given in (cost, influence))
    if len(influence) < FEW or len(cost) != len(influence):
        return []
    drop = {block: by_proxy.index(block) - by_cost.index(block) for block in by_cost[: len(by_cost) // 3]}
    block = max(drop, key=lambda block: drop[block], default=None)
    if block is None or drop[block] < len(cost) / 4:
        return []
    return [
        f"Block influence does not see block {block}: {number(influence[block])}, number {by_proxy.index(block) + 1} of "
        f"{len(cost)}; by what its removal costs ({signed(cost[block])}{UNITS.get(metric, '')}) it is number "
        f"{by_cost.index(block) + 1}."
    ]  # fmt: skip


def title_of(metric: str) -> str:
    """The metric's title, for headings."""
    return next(group[metric].title for group in (PATH_METRICS, REMOVAL_METRICS, METRICS) if metric in group)
