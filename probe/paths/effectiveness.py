"""How effective paths of each length are: what they carry, and what the model's own head makes of it.

Three ways to ask about length k: paths of that length `alone`, of lengths `up_to` k, and `all_but` k. Biases
are always there. What the head says of a partial sum is scored by the task (rc_probe.tasks): agreement with
the full model, and quality against what is right. Source: Dong et al. 2021, section 4.2, and exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rc_probe.data.batches import Batch
from rc_probe.hooks.edits.model_head import NarrowHead
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.frozen.frozen_pass import Step
from rc_probe.hooks.structure.structure import Structure
from rc_probe.metrics.stream_metrics import measure
from rc_probe.processes.world import World
from rc_probe.results.path_verdict import ALL_BUT, ALONE, UP_TO
from rc_probe.tasks import Task
from rc_probe.tasks.narrow import narrow_head

from .decompose import BIAS, Decomposition, decompose, hops
from .effects import EXACT, LIVE, NONE, SAMPLED, Effects, Key, Seen, effects_of
from .head_answers import HeadAnswers
from .live import draw_paths, live, summed
from .sample import sample

Streams = Callable[[dict[str, Any]], Tensor | None]
SOURCE_SAMPLES = 8  # that tokens, positions and biases are told apart on


@dataclass(frozen=True)
class Budget:
    """How much is drawn: `paths` at each length and estimate, for each number in turn; `repeats` estimates."""

    paths: tuple[int, ...] = (5,)
    repeats: int = 5
    max_length: int | None = None
    count_mlp: bool = False
    seed: int = 0


def effectiveness(
    structure: Structure,
    task: Task | None,
    batches: Sequence[Batch],
    budget: Budget,
    advance: Callable[[str], None] = lambda stage: None,
    world: World | None = None,
    streams: Streams | None = None,
) -> Effects:
    """Measure the paths of every length on `batches`, which are those of the task's samples.

    world: the processes that share the batches; the result is the same in each
    streams: by the inputs of a plain pass that was made before the stream (batch, tokens, dim) after its last block; where there
        is none, one is made

    Raises RcProbeError where the model cannot be frozen. Where only single heads cannot be told apart, or rows cannot
    go their own ways, the estimator is left out with a note.
    """
    world = world or World()
    run = _Run(structure, task, budget, streams)

    def measured() -> list[Seen]:
        return [run.batch(batch, advance) for batch in world.share(batches)]

    seen = itertools.chain.from_iterable(world.together(measured, what="paths"))
    return effects_of(sorted(seen, key=lambda one: one.start), task)


class _Run:
    """Of one batch after the other: the plain pass and the decomposition, that all estimators share."""

    def __init__(
        self, structure: Structure, task: Task | None, budget: Budget, streams: Streams | None
    ) -> None:
        self.structure, self.task, self.budget, self.streams = structure, task, budget, streams
        self.choices: list[Step] = hops(structure, count_mlp=budget.count_mlp)
        self.estimates = {SAMPLED: self.sampled, LIVE: self.live} if budget.paths else {}
        self._narrow: list[NarrowHead | None] = []  # once it is known

    def batch(self, batch: Batch, advance: Callable[[str], None]) -> Seen:
        """Everything of one batch. An estimator that fails on one is not tried again."""
        self.seen = Seen(batch.start)
        self.prepared = self.task.prepare(batch) if self.task else None
        self.inputs = dict(self.prepared.inputs if self.prepared else batch.inputs)
        self._take_apart()
        self.exact()
        advance(EXACT)
        if batch.start < SOURCE_SAMPLES:
            self.by_source()
        for name in list(self.estimates):
            try:
                self.estimates[name]()
            except RcProbeError as error:
                del self.estimates[name]
                self.seen.failed[name] = str(error)
            advance(name)
        return self.seen

    def _take_apart(self) -> None:
        """The plain pass, if none was made before, the decomposition, and the head that can be asked."""
        self.plain = self.streams(self.inputs) if self.streams else None
        self.answers = None
        if self.plain is None and self.prepared:
            self.answers = self._asked()
            self.plain = self.answers.stream
        outputs: dict[int, Any] | None = {} if self.prepared and self.answers is None else None
        self.whole = self._decompose(max_length=self.budget.max_length, outputs=outputs)
        if outputs is not None:
            self.answers = self._asked(outputs)

    def _asked(self, outputs: dict[int, Any] | None = None) -> HeadAnswers:
        assert self.task is not None and self.prepared is not None
        if not self._narrow:
            self._narrow.append(narrow_head(self.task, self.prepared))
        return HeadAnswers(self.structure, self.task, self.prepared, self._narrow[0], outputs, self.plain)

    def _decompose(self, **how: Any) -> Decomposition:
        return decompose(
            self.structure, self.inputs, count_mlp=self.budget.count_mlp, plain=self.plain, **how
        )

    # ---- the three estimators

    def exact(self) -> None:
        whole = self.whole
        self.seen.counts, self.seen.error = whole.counts, whole.error
        parts: dict[tuple[str, int | None], Tensor] = {
            (ALONE, k): whole.length(k) for k in range(whole.most + 1)
        }
        parts[NONE, None] = whole.bias
        total = torch.stack([_size(p, whole.mask) for p in parts.values()]).sum(0).clamp_min(1e-300)
        output = measure(whole.value, whole.mask, ["residual_absolute"])["residual_absolute"][0]
        for (scope, k), part in parts.items():
            self._shape((EXACT, 0, scope, k, 0), whole, part, total, output.clamp_min(1e-300))
        with self._scoring(EXACT) as score:
            score((EXACT, 0, NONE, None, 0), _bias(whole))
            for scope, k, stream in _scopes(_bias(whole), list(_streams(whole)), whole.stream_value):
                score((EXACT, 0, scope, k, 0), stream)

    def sampled(self) -> None:
        whole = self.whole
        drawn = {
            n: sample(
                self.structure, self.inputs, paths=n, repeats=self.budget.repeats, seed=self.budget.seed,
                max_length=self.budget.max_length, count_mlp=self.budget.count_mlp,
            )
            for n in self.budget.paths
        }  # fmt: skip
        with self._scoring(SAMPLED) as score:
            for n, repeat in itertools.product(drawn, range(self.budget.repeats)):
                for k, part in enumerate(drawn[n].parts[repeat]):
                    key = (SAMPLED, n, ALONE, k, repeat)
                    self.seen.add(key, "projection", _projection(part, whole.value, whole.mask))
                estimates = list(drawn[n].stream[repeat])
                for scope, k, stream in _scopes(_bias(whole), estimates, whole.stream_value):
                    score((SAMPLED, n, scope, k, repeat), stream)

    def live(self) -> None:
        generator = torch.Generator().manual_seed(self.budget.seed)
        longest = len(self.choices) if self.budget.max_length is None else self.budget.max_length
        lengths = range(min(longest, len(self.choices)) + 1)
        ends: dict[int, list[Tensor]] = {}
        for n in self.budget.paths if self.task else ():
            drawn = [
                draw_paths(self.choices, k, n, generator) for _ in range(self.budget.repeats) for k in lengths
            ]
            states = live(self.structure, self.inputs, torch.cat(drawn), count_mlp=self.budget.count_mlp)
            ends[n] = [summed(part) for part in states.split(n)]
        with self._scoring(LIVE) as score:
            for n, streams in ends.items():
                for i, stream in enumerate(streams):
                    repeat, k = divmod(i, len(lengths))
                    score((LIVE, n, ALONE, k, repeat), stream)

    # ---- scoring

    @contextmanager
    def _scoring(self, name: str) -> Iterator[Callable[[Key, Tensor], None]]:
        """Scores streams of a batch by what the model's own head makes of them; without a task nothing."""
        if self.task is None or self.answers is None:
            yield lambda key, stream: None
            return
        answers, tally = self.answers, self.task.tally()
        self.seen.tallies[name] = tally
        with answers.asking():
            tally.resume(answers.prepared, answers.plain)
            yield lambda key, stream: tally.put(key, answers.to(stream))

    def _shape(
        self, key: Key, whole: Decomposition, part: Tensor, total: Tensor, whole_residual: Tensor
    ) -> None:
        """What a part is beside the output: share, projection, cosine, residual; one number a sample.

        total (batch,): the sizes of all parts together; whole_residual (batch,): ‖res Y‖₁,∞ of the output.
        """
        mask = whole.mask
        self.seen.add(key, "norm_share", _size(part, mask) / total)
        self.seen.add(key, "projection", _projection(part, whole.value, mask))
        self.seen.add(key, "cosine_to_output", _cosine(part, whole.value, mask))
        own = measure(part, mask, ["residual", "residual_absolute"])
        self.seen.add(key, "residual", own["residual"][0])
        self.seen.add(key, "residual_share", own["residual_absolute"][0] / whole_residual)

    def by_source(self) -> None:
        """Tokens, positions and biases, told apart on the first SOURCE_SAMPLES samples of the run."""
        try:
            whole = self._decompose(by_source=True, by_length=False)
        except RcProbeError as error:
            self.seen.failed[""] = str(error)
            return
        names = list(dict.fromkeys(whole.sources))
        sizes = {name: _size(whole.source(name), whole.mask) for name in names}
        total = torch.stack(list(sizes.values())).sum(0).clamp_min(1e-300)
        for name in names:
            values = {
                "norm_share": sizes[name] / total,
                "projection": _projection(whole.source(name), whole.value, whole.mask),
            }
            for metric, value in values.items():
                self.seen.sources[name, metric] = value[: SOURCE_SAMPLES - self.seen.start].double().cpu()


def _streams(whole: Decomposition) -> Iterator[Tensor]:
    """The part of each length in the stream after the last block."""
    return (whole.stream[whole.channels(k)].sum(0) for k in range(whole.most + 1))


def _bias(whole: Decomposition) -> Tensor:
    return whole.stream[[i for i, s in enumerate(whole.sources) if s == BIAS]].sum(0)


def _scopes(bias: Tensor, parts: list[Tensor], total: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """(scope, length, stream) for every length."""
    up_to = bias
    for k, part in enumerate(parts):
        alone = bias + part
        up_to = up_to + part if k else alone  # the same object: it is scored once
        yield ALONE, k, alone
        yield UP_TO, k, up_to
        yield ALL_BUT, k, total - part


def _size(x: Tensor, mask: Tensor | None) -> Tensor:
    """Frobenius norm over real tokens, (batch,)."""
    size: Tensor = torch.linalg.vector_norm(_real(x, mask), dim=(1, 2))
    return size


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    x = x.double()
    return x if mask is None else x * mask[..., None]


def _projection(part: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """<part, output> / <output, output> of each sample: over all parts it adds up to 1."""
    p, v = _real(part, mask), _real(value, mask)
    return (p * v).sum((1, 2)) / v.square().sum((1, 2)).clamp_min(1e-300)


def _cosine(part: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens of the cosine between part and output, (batch,)."""
    each = torch.cosine_similarity(part.double(), value.double(), dim=-1)
    if mask is None:
        return each.mean(1)
    return (each * mask).sum(1) / mask.sum(1).clamp_min(1)
