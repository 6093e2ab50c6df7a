"""What the batches of a run say of its paths together: the rows of the tables `paths` and `path_sources`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rc_probe.results.tables import Row
from rc_probe.tasks import FULL, Tally, Task

from .summaries import mean_of, over_repeats, over_samples

Key = tuple[str, int, str, int | None, int]  # estimator, paths drawn, scope, length, repeat
EXACT, SAMPLED, LIVE = "exact", "sampled", "live"
NONE = "none"
LEFT_OUT = {
    "": "Positions were not told from tokens",
    SAMPLED: "Paths were not sampled",
    LIVE: "Paths were not run live",
}


@dataclass
class Effects:
    """What was found. rows: of the table `paths`; sources: of `path_sources`; error: largest of the decompositions.

    notes: what could not be measured, in sentences
    """

    rows: list[Row] = field(default_factory=list)
    sources: list[Row] = field(default_factory=list)
    error: float = 0.0
    notes: list[str] = field(default_factory=list)


@dataclass
class Seen:
    """What was found on one batch, small enough to go to another process.

    start: number of its first sample
    tallies: scores by estimator; values: by key and metric, (batch,); sources: by source and metric, (batch,)
    error: of its decomposition; counts: paths of each length
    failed: why an estimator was left out, by its name; "" is that of the sources
    """

    start: int
    tallies: dict[str, Tally] = field(default_factory=dict)
    values: dict[tuple[Key, str], Tensor] = field(default_factory=dict)
    sources: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    error: float = 0.0
    counts: tuple[int, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, key: Key, metric: str, values: Tensor) -> None:
        self.values[key, metric] = values.detach().double().cpu()


def effects_of(seen: list[Seen], task: Task | None) -> Effects:
    """What all batches, in the order of the data, say together."""
    found = Effects(error=max(one.error for one in seen))
    failed = {name: why for one in reversed(seen) for name, why in one.failed.items()}
    for name, words in LEFT_OUT.items():
        if name in failed:
            found.notes.append(f"{words}: {failed[name]}")
    tallies = _merged(seen, task, failed)
    weights = tallies[EXACT].counts() if tallies else None
    counts = seen[0].counts
    grouped: dict[tuple[str, int, str, int | None, str], list[Tensor]] = {}
    for ((name, n, scope, k, _), metric), values in _values(seen, tallies, failed):
        grouped.setdefault((name, n, scope, k, metric), []).append(values)
    for (name, n, scope, k, metric), repeats in grouped.items():
        summary = (
            over_samples(repeats[0], metric, weights)
            if name == EXACT
            else over_repeats(torch.stack([mean_of(v, metric, weights) for v in repeats]), metric)
        )
        found.rows.append(
            {
                "length": k, "count": None if k is None else str(counts[k]), "estimator": name,
                "drawn": n or None, "scope": scope, "metric": metric, **summary,
            }
        )  # fmt: skip
    if tallies:
        found.rows += _reference_rows(tallies[EXACT])
    if "" not in failed:
        for (name, metric), values in _joined(one.sources for one in seen).items():
            found.sources.append({"source": name, "metric": metric, **over_samples(values, metric)})
    return found


def _merged(seen: list[Seen], task: Task | None, failed: dict[str, str]) -> dict[str, Tally]:
    """The scores of each estimator that was measured on every batch."""
    merged: dict[str, Tally] = {}
    for one in seen:
        for name, tally in one.tallies.items():
            if task is not None and name not in failed:
                merged.setdefault(name, task.tally()).merge(tally)
    return merged


def _values(
    seen: list[Seen], tallies: dict[str, Tally], failed: dict[str, str]
) -> Iterator[tuple[tuple[Key, str], Tensor]]:
    for (key, metric), values in _joined(one.values for one in seen).items():
        if key[0] not in failed:
            yield (key, metric), values
    for tally in tallies.values():
        for key, scores in tally.scores().items():
            for metric, values in scores.items() if key != FULL else ():
                yield (key, metric), values  # type: ignore[misc]


def _joined(batches: Iterable[dict[tuple[Any, str], Tensor]]) -> dict[tuple[Any, str], Tensor]:
    lists: dict[tuple[Any, str], list[Tensor]] = {}
    for one in batches:
        for key, values in one.items():
            lists.setdefault(key, []).append(values)
    return {key: torch.cat(values) for key, values in lists.items()}


def _reference_rows(tally: Tally) -> Iterator[Row]:
    """The full model, and the best constant answer or chance, from the same samples."""
    for metric, value in tally.baselines().items():
        yield _reference("baseline", metric, torch.tensor([value], dtype=torch.float64))
    for metric, values in tally.scores()[FULL].items():
        row = _reference("full", metric, values, tally.counts())
        itself = {"low": math.nan, "high": math.nan} if metric == "agreement" else {}  # by definition 1
        yield row | itself


def _reference(name: str, metric: str, values: Tensor, weights: Tensor | None = None) -> Row:
    return {"length": None, "count": None, "estimator": name, "drawn": None, "scope": name, "metric": metric,
            **over_samples(values, metric, weights)}  # fmt: skip
