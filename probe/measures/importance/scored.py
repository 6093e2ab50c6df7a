"""Passes scored by what the model predicts: samples and task, batches as the task runs them, and the reader.

Only small tensors leave a batch. Batches keep their place in the data, so that the numbers are the same however
processes share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rc_probe import engine, tasks
from rc_probe.budget import MEMORY
from rc_probe.data.batches import Batch, Batches, batches
from rc_probe.data.samples import Samples
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.edits.model_head import NarrowHead
from rc_probe.hooks.errors import RcProbeError
from rc_probe.metrics.intervals import change_interval
from rc_probe.metrics.stream_metrics import measure
from rc_probe.models.load import Loaded
from rc_probe.paths.summaries import mean_of
from rc_probe.registry import WHOLE
from rc_probe.results.tables import Row
from rc_probe.tasks import FULL, Prepared, Tally, Task, first
from rc_probe.tasks.base import Readout
from rc_probe.tasks.drift import drift_of
from rc_probe.tasks.narrow import narrow_head, narrowed, words_of

if TYPE_CHECKING:
    from rc_probe.measures.context import Context

BULK = "residual_bulk"


@dataclass(frozen=True)
class Plan(tasks.Plan):
    """What passes are scored on. length: tokens of each text at most, where they are fewer than the run's."""

    length: int | None = None
    _head: list[NarrowHead | None] = field(default_factory=list)  # once it is known

    def head(self, loaded: Loaded, chosen: Any) -> NarrowHead | None:
        """The head at the scored positions alone, where that gives the same; tried once, on the first batch."""
        if not self._head:
            first = next(prepared_batches(self.task, self.batches(loaded, chosen).of([0])))
            self._head.append(narrow_head(self.task, first.prepared))
        return self._head[0]

    def batches(self, loaded: Loaded, chosen: Any) -> Batches:
        """As the model gets them; the task prepares each when it runs."""

        def of(size: int) -> Batches:
            return batches(
                self.scored, loaded, length=self.length or chosen.length, batch_size=size,
                special_tokens=chosen.special_tokens,
            )  # fmt: skip

        made = of(chosen.batch_size)
        # the scores of all words at all tokens, of four bytes each
        most = MEMORY // (4 * (made.longest or 1) * max(1, words_of(self.task)))
        return made if most >= chosen.batch_size else of(max(1, most))


def plan_scored(loaded: Loaded, samples: Samples, chosen: Any) -> Plan:
    """The task of these samples. Raises RcProbeError for labels that cannot be meant."""
    return Plan.of(loaded, samples, chosen)


def cut(context: Context, plan: Plan, count: int, tokens: int, passes: int) -> Plan:
    """The plan of its first `count` samples, of `tokens` tokens each at most; where that is less a note says so, and why."""
    most = len(plan.samples.items)
    if (count, tokens) == (most, context.shape.tokens):
        return plan
    if count < most:
        plan = plan_scored(context.loaded, first(plan.samples, count), context.settings)
    shorter = tokens < context.shape.tokens
    of = f" of {tokens} tokens" if shorter else ""
    note = (
        f"Importance: on {count} of {most} samples{of}, so that it costs no more than {passes} plain passes over all samples "
        f"(docs/large-models.md): --importance-samples {most} takes all."
    )
    return replace(plan, notes=[*plan.notes, note], length=tokens if shorter else None)


@dataclass(frozen=True)
class ScoredBatch(Batch):
    """A batch as its task runs it; prepared: None without a task."""

    prepared: Prepared | None = None


def prepared_batches(task: Task | None, made: Iterable[Batch]) -> Iterator[ScoredBatch]:
    for batch in made:
        prepared = task.prepare(batch) if task else None
        yield ScoredBatch(
            prepared.inputs if prepared else batch.inputs, batch.mask, batch.start, prepared=prepared
        )


def _whole_between(made: Iterable[Batch], head: NarrowHead | None) -> Iterator[Batch]:
    """The batches; what runs before one begins, such as proofs, gets the whole head."""
    for batch in made:
        if head is not None:
            head.at = None
        yield batch


@dataclass
class Answers:
    """What the plain model said on a batch: later passes are compared with it."""

    readout: Readout
    drift: Tensor | None


@dataclass
class Seen:
    """The scores of one batch. drift, bulk: by the name of the pass; failed: why a pass has no score."""

    start: int
    tally: Tally | None
    drift: dict[str, Tensor] = field(default_factory=dict)
    bulk: dict[str, Tensor] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class ScoreReader:
    """Scores each pass of the engine by the task, and reads the residual of the bulk behind the last block.

    plain: what the plain model said on each batch, by its start; filled by the first run, so that runs with a base
    compare with the plain model, too
    """

    def __init__(
        self, task: Task | None, depth: int, plain: dict[int, Answers], head: NarrowHead | None
    ) -> None:
        self.task, self.depth, self.plain, self.head = task, depth, plain, head
        self.drift = drift_of(task)
        self.wants_output = task is not None
        self.seen: list[Seen] = []

    def begin(self, batch: Batch) -> None:
        assert isinstance(batch, ScoredBatch)
        self.batch, self.now = batch, Seen(batch.start, self.task.tally() if self.task else None)
        self.seen.append(self.now)
        self.prepared = batch.prepared  # where the scores are in what the model returns
        if self.head is not None and batch.prepared is not None and batch.prepared.column is not None:
            self.head.at = batch.prepared.row, batch.prepared.column
            self.prepared = narrowed(batch.prepared)

    def stream(self, name: str, layer: int, x: Tensor) -> None:
        if layer == self.depth:
            self.now.bulk[name] = measure(x, self.batch.mask, [BULK])[BULK][0].cpu()

    def as_plain(self, name: str, layers: range) -> None:
        if self.depth in layers:
            self.now.bulk[name] = self.now.bulk[WHOLE]

    def output(self, name: str, output: Any) -> None:
        tally, start, there = self.now.tally, self.batch.start, self.prepared
        prepared = self.batch.prepared
        if self.task is None or prepared is None or there is None or tally is None:
            return
        first = start not in self.plain
        if first:
            answers = self.drift.read(output, there) if self.drift else None
            self.plain[start] = Answers(self.task.read(output, there), answers)
        plain = self.plain[start]
        if name == WHOLE:
            tally.resume(prepared, plain.readout)
        if name == WHOLE and first:  # the plain model itself, which the tally keeps by that name
            if self.drift and plain.drift is not None:
                self.now.drift[name] = self.drift.between(plain.drift, plain.drift, prepared)
            return
        try:
            tally.put(name, self.task.read(output, there))
            if self.drift and plain.drift is not None:
                answers = self.drift.read(output, there)
                self.now.drift[name] = self.drift.between(plain.drift, answers, prepared)
        except RcProbeError as error:  # what is left of the model overflows
            self.now.failed[name] = str(error)


@dataclass
class Scores:
    """values: by pass and metric, (samples,) float64; weights: predictions of each sample; failed: passes without a score."""

    values: dict[str, dict[str, Tensor]]
    weights: Tensor | None
    failed: dict[str, str]

    @classmethod
    def of(cls, task: Task | None, parts: Iterable[Seen]) -> Scores:
        """Of all batches of all processes, in the order of the data."""
        ordered = sorted(parts, key=lambda part: part.start)
        failed = {name: why for part in ordered for name, why in part.failed.items()}
        names = [name for name in ordered[0].bulk if name not in failed]
        values: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        weights = None
        if task is not None:
            tally, drift = task.tally(), drift_of(task)
            for part in ordered:
                if part.tally is not None:
                    tally.merge(part.tally)
            weights = tally.counts()
            tally.drop(failed)
            scores = tally.scores()
            for name in names:
                values[name].update(scores[name if name in scores else FULL])
                if drift:
                    together = torch.cat([part.drift[name] for part in ordered])
                    values[name][drift.metric] = drift.by_sample(together)
        for name in names:
            values[name][BULK] = torch.cat([part.bulk[name] for part in ordered])
            # A metric is left out where no sample has a position to score.
            values[name] = {metric: found for metric, found in values[name].items() if len(found)}
        return cls(values, weights, failed)

    def mean(self, name: str, metric: str) -> float:
        """Over samples; that of a loss over their predictions."""
        return float(mean_of(self.values[name][metric], metric, self._weights(name, metric)))

    def _weights(self, name: str, metric: str) -> Tensor | None:
        fits = self.weights is not None and len(self.weights) == len(self.values[name][metric])
        return self.weights if fits and metric != BULK else None

    def _count(self, values: Tensor) -> int:
        """Samples; a rank correlation is one number of all of them."""
        return len(self.weights) if len(values) == 1 and self.weights is not None else len(values)

    def changes(self, name: str, against: Scores) -> Iterator[Row]:
        """For each metric: value, that of the plain model, their difference and its paired interval."""
        for metric, values in self.values[name].items():
            plain, weights = against.values[WHOLE][metric], self._weights(name, metric)
            value, baseline = self.mean(name, metric), against.mean(WHOLE, metric)
            low, high = change_interval(
                values.numpy(), plain.numpy(), metric, None if weights is None else weights.numpy()
            )
            yield {
                "metric": metric, "value": value, "baseline": baseline, "change": value - baseline,
                "low": low, "high": high, "count": self._count(values),
            }  # fmt: skip


def score(
    context: Context,
    plan: Plan,
    edits: Mapping[str, Edits],
    plain: dict[int, Answers],
    *,
    base: Edits | None = None,
    readers: Iterable[engine.Reader] = (),
    stage: str = "",
    counted: bool = False,
) -> tuple[Scores, list[str]]:
    """The scores of the plain pass (with `base`) and of each intervention, all processes together, and notes.

    counted: the measurement said before how many passes there will be
    """
    made, task = plan.batches(context.loaded, context.settings), plan.task
    mine = made.of(context.world.share(range(len(made))))
    head = plan.head(context.loaded, context.settings)
    reader = ScoreReader(task, context.structure.depth, plain, head)
    others = [*readers, *(context.everywhere if base is None else ())]
    with head.installed() if head else nullcontext():
        notes = engine.run(
            context.structure, _whole_between(prepared_batches(task, mine), head), edits, [reader, *others], base=base,
            model=task.model if task else None, advance=lambda name: context.advance(f"{stage}: {name}", passes=int(counted)),
        )  # fmt: skip
    together = context.world.gather(reader.seen, what=stage)
    return Scores.of(task, [part for parts in together for part in parts]), notes
