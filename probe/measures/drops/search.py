"""The search: greedy by the true loss, the window of least angular distance, and random orders.

One half of the samples chooses, the other half scores: what was chosen on samples looks better on them than it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from rc_probe.data.samples import Samples
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.edits.gates import has_component
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import Structure
from rc_probe.interventions.gate import Gated
from rc_probe.interventions.intervention import Variant
from rc_probe.measures.importance.proxies import BlockReader, together
from rc_probe.measures.importance.scored import Answers, Plan, Scores, plan_scored, score
from rc_probe.measures.measurement import Found
from rc_probe.models.load import Loaded
from rc_probe.registry import WHOLE
from rc_probe.results.findings.importance_words import CRITERIA
from rc_probe.results.tables import Row

from .emission import emit

if TYPE_CHECKING:
    from rc_probe.measures.context import Context

GREEDY, ANGULAR, RANDOM = "greedy", "angular", "random"
CHOSEN, HELD_OUT = "chosen", "held_out"
DRAWS = 5  # random orders


@dataclass(frozen=True)
class Halves:
    """The samples that choose, every second one, and those that score."""

    chosen: Plan
    held_out: Plan


@dataclass(frozen=True)
class Order:
    """What a method removes: `steps[n]` are the parts that are gone after step n + 1, the last of them by that step."""

    method: str
    steps: tuple[tuple[Gated, ...], ...]
    draw: int | None = None

    def name(self, step: int) -> str:
        return f"{self.method} {self.draw or ''}: {step}"


def plan_halves(loaded: Loaded, samples: Samples, chosen: Any) -> Halves:
    """The task of each half. RcProbeError where nothing can be scored, before any pass."""
    halves = []
    for start in (0, 1):
        labels = None if samples.labels is None else samples.labels[start::2]
        half = replace(samples, items=samples.items[start::2], labels=labels)
        plan = plan_scored(loaded, half, chosen) if half.items else None
        if plan is None or plan.task is None:
            why = " ".join(plan.notes) if plan else "There are too few samples."
            todo = "Give more samples, or labels by --label-column"
            raise RcProbeError(f"nothing says what a removal costs. {why}", where="--drop", todo=todo)
        halves.append(plan)
    return Halves(*halves)


def candidates(structure: Structure, parts: Sequence[str]) -> list[Gated]:
    """What may go, in the order of the blocks."""
    return [
        Gated(part, (block.index + 1,))
        for block in structure.blocks
        for part in parts
        if has_component(block, part)
    ]


def most_steps(structure: Structure, chosen: Any) -> int:
    """How many parts may go at most: a model keeps one block. RcProbeError for more."""
    found = candidates(structure, chosen.drop_parts)
    most = len(found) - ("block" in chosen.drop_parts)
    if (chosen.drop or 1) > most:
        kinds = " and ".join(chosen.drop_parts)
        raise RcProbeError(
            f"{chosen.drop or 1} cannot go: it has {len(found)} parts of the kind {kinds}", where="--drop",
            todo=f"Give at most {most}" if most > 0 else "Choose other --drop-parts",
        )  # fmt: skip
    return chosen.drop or most


class _Search:
    """One search. plain: what the plain model said on the chosen half; whole: its scores there."""

    def __init__(self, context: Context, halves: Halves) -> None:
        self.context, self.halves = context, halves
        self.plain: dict[int, Answers] = {}
        self.found = Found()

    def score(self, edits: Mapping[str, Edits], stage: str, **more: Any) -> Scores:
        scores, notes = score(self.context, self.halves.chosen, edits, self.plain, stage=stage, **more)
        self.found.notes += [note for note in notes if note not in self.found.notes]
        return scores

    def greedy(self, most: int) -> tuple[Order, list[Scores]]:
        """The order, and the scores of each step's candidates; the first also of the whole model."""
        structure, chosen = self.context.structure, self.context.settings
        limit, left = chosen.limit(), candidates(structure, chosen.drop_parts)
        self.reader = BlockReader(most)
        gone: tuple[Gated, ...] = ()
        steps: list[tuple[Gated, ...]] = []
        seen: list[Scores] = []
        while len(steps) < most:
            base = Variant(GREEDY, gone).edits(structure) if gone else None
            scores = self.score(
                {part.label: part.edits(structure) for part in left}, f"drop {len(steps) + 1}", base=base,
                readers=() if gone else [self.reader],
            )  # fmt: skip
            metric = self.metric(scores)
            able = [part for part in left if part.label not in scores.failed]
            best = min(able, key=lambda part: scores.mean(part.label, metric), default=None)
            whole = seen[0] if seen else scores
            if best is None or (
                limit and limit.passed(*self._limited(scores, best.label, whole, limit.metric))
            ):
                break
            gone = (*gone, best)
            steps.append(gone)
            seen.append(scores)
            left.remove(best)
        self.whole = seen[0] if seen else scores
        return Order(GREEDY, tuple(steps)), seen

    @staticmethod
    def metric(scores: Scores) -> str:
        """What removals are judged by."""
        return next(metric for metric in CRITERIA if metric in scores.values[WHOLE])

    def _limited(self, scores: Scores, name: str, whole: Scores, metric: str) -> tuple[float, float]:
        if metric not in scores.values[name]:
            there = ", ".join(scores.values[name])
            raise RcProbeError(
                f"{metric} is not measured on this model", where="--drop-until", todo=f"There are {there}"
            )
        return scores.mean(name, metric), whole.mean(WHOLE, metric)

    def windows(self, steps: int) -> Order:
        """For each length the run of blocks whose ends are turned to each other least."""
        parts = self.context.world.gather(self.reader.seen, what="angular distances")
        distance = {
            key: float(both[1].mean()) for key, both in together(p for own in parts for p in own).items()
        }
        found = []
        for length in range(1, steps + 1):
            start = min(
                (block for block, blocks in distance if blocks == length),
                key=lambda block: distance[block, length],
            )
            found.append(tuple(Gated("block", (block,)) for block in range(start, start + length)))
        return Order(ANGULAR, tuple(found))

    def random(self, steps: int) -> Iterator[Order]:
        parts = candidates(self.context.structure, self.context.settings.drop_parts)
        generator = torch.Generator().manual_seed(self.context.settings.seed)
        for draw in range(1, DRAWS + 1):
            drawn = [parts[i] for i in torch.randperm(len(parts), generator=generator)[:steps].tolist()]
            yield Order(RANDOM, tuple(tuple(drawn[:n]) for n in range(1, steps + 1)), draw)


def drops(context: Context, halves: Halves) -> Found:
    """Rows of the table `drops`, and in the facts the list that won, with what builds it."""
    search = _Search(context, halves)
    search.found.notes += halves.chosen.notes
    first, seen = search.greedy(most_steps(context.structure, context.settings))
    steps = len(first.steps)
    facts = search.found.facts
    facts |= {
        "task": halves.chosen.task.name if halves.chosen.task else None, "criterion": search.metric(search.whole),
        "samples": {CHOSEN: len(halves.chosen.samples.items), HELD_OUT: len(halves.held_out.samples.items)},
        "parts": list(context.settings.drop_parts), "removed": 0,
    }  # fmt: skip
    if not steps:
        return search.found
    others = [*search.random(steps)]
    if "block" in context.settings.drop_parts:
        others.insert(0, search.windows(steps))
    whole = search.whole
    chosen = search.score(_all(context.structure, others), "drop: other methods")
    held, _ = score(
        context,
        halves.held_out,
        _all(context.structure, [first, *others]),
        {},
        stage="drop: samples held out",
    )
    rows = [
        row
        for n, (parts, scores) in enumerate(zip(first.steps, seen, strict=True), 1)
        for row in _rows(first, n, CHOSEN, scores.changes(parts[-1].label, whole))
    ]
    for order, split, scores in [
        *((each, CHOSEN, chosen) for each in others), *((each, HELD_OUT, held) for each in [first, *others]),
    ]:  # fmt: skip
        for n in range(1, steps + 1):
            if order.name(n) in scores.values:
                rows += _rows(order, n, split, scores.changes(order.name(n), scores))
    search.found.tables["drops"] = rows
    best = _best(rows, facts["criterion"], [first, *others])
    facts |= {
        "removed": steps, "method": best.method, "draw": best.draw,
        "list": [{"component": part.part, "block": part.blocks[0]} for part in best.steps[-1] if part.blocks],
        **emit(context, halves.chosen, best.steps[-1]),
    }  # fmt: skip
    return search.found


def _all(structure: Structure, orders: Sequence[Order]) -> dict[str, Edits]:
    return {
        order.name(n): Variant(order.name(n), parts).edits(structure)
        for order in orders
        for n, parts in enumerate(order.steps, 1)
    }


def _rows(order: Order, step: int, split: str, changes: Iterator[Row]) -> list[Row]:
    parts = order.steps[step - 1]
    at = parts[0] if order.method == ANGULAR else parts[-1]
    place = {"method": order.method, "draw": order.draw, "split": split, "step": step, "component": at.part,
             "block": at.blocks[0] if at.blocks else None}  # fmt: skip
    return [place | row for row in changes]


def _best(rows: Sequence[Row], metric: str, orders: Sequence[Order]) -> Order:
    """Whichever loses least after the last step on the samples that chose; the first of those that are equal."""
    last = {
        (row["method"], row["draw"]): row["value"]
        for row in rows
        if row["split"] == CHOSEN and row["metric"] == metric and row["step"] == len(orders[0].steps)
    }
    return min(
        (order for order in orders if (order.method, order.draw) in last),
        key=lambda order: last[order.method, order.draw],
    )
