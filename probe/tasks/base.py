"""The interface that all tasks share: what goes in, what is read of what comes out, and what that scores.

Somebody else runs the model, as often as there are versions of it to compare (partial sums of paths,
ablations), and hands the outputs over:

    task, notes = choose_task(loaded, samples)
    tally = task.tally()
    for batch in batches(task.samples, loaded):
        prepared = task.prepare(batch)
        tally.start(prepared, task.model(**prepared.inputs))   # the full model: what the others are compared with
        tally.add("length ≤ 2", output_of_that_sum)            # any number of them
    tally.scores()["length ≤ 2"]["agreement"]                  # (samples,)
    tally.counts()                                             # (samples,): how many predictions each is about
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rc_probe.data.batches import Batch
from rc_probe.data.samples import Samples
from rc_probe.hooks.structure.example_inputs import batch_size

FULL = "full model"  # the key of the versions that a tally was started with

Readout = dict[str, Tensor]  # small tensors on the CPU, as the task names them


@dataclass(frozen=True)
class Prepared:
    """A batch as its task runs it.

    inputs: keyword arguments of the forward pass, on the model's device
    rows: samples in the batch; samples: their numbers, counted from 0 over the run
    mask: (rows, tokens) bool, False for padding; None if all is real
    row, column: (P,) the scored positions: which sample of the batch, which token of its output; column is None
        where a sample has one prediction
    targets: (P,) the right classes; None where nothing says what is right
    """

    inputs: dict[str, Any]
    rows: int
    samples: range
    mask: Tensor | None
    row: Tensor
    column: Tensor | None = None
    targets: Tensor | None = None

    def at(self, which: slice) -> Prepared:
        """The same with these of its scored positions alone."""
        column, targets = (None if each is None else each[which] for each in (self.column, self.targets))
        return replace(self, row=self.row[which], column=column, targets=targets)


def whole(batch: Batch) -> Prepared:
    """The batch as it is, with one prediction for each sample."""
    device = next(t.device for t in batch.inputs.values())
    rows = batch_size(batch.inputs)
    samples = range(batch.start, batch.start + rows)
    return Prepared(batch.inputs, rows, samples, batch.mask, torch.arange(rows, device=device))


class Task(ABC):
    """What is predicted.

    name: for the reader
    metrics: the names of the scores, in display order
    model: whose forward pass gives the outputs to read: the loaded model, or its base model where the head is not
        used. The base model runs within the loaded one, so edits of the one act in the other
    samples: what to make batches of, in this order; not the samples given where the task needs others
    """

    name: str
    metrics: tuple[str, ...]
    model: Any
    samples: Samples

    @abstractmethod
    def prepare(self, batch: Batch) -> Prepared:
        """The batch as the task runs it, and the positions that count."""

    @abstractmethod
    def read(self, output: Any, prepared: Prepared) -> Readout:
        """What the output of `model(**prepared.inputs)`, or of another version of the model, says.

        output: a ModelOutput, or the tensor in it that `head` takes out. Raises RcProbeError for NaN or infinity.
        """

    @abstractmethod
    def head(self, output: Any) -> Tensor:
        """The tensor of an output that `read` reads, its first axis the samples: logits or hidden states."""

    @abstractmethod
    def tally(self) -> Tally:
        """A new one."""


class Tally(ABC):
    """The scores of several versions of a model, collected over the batches of a run."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._kept: dict[Hashable, dict[str, list[Tensor]]] = {}

    def start(self, prepared: Prepared, output: Any) -> None:
        """The next batch, with the output of the full model on it."""
        self.resume(prepared, self.task.read(output, prepared))

    def resume(self, prepared: Prepared, readout: Readout) -> None:
        """The next batch, with what was read of the full model on it before."""
        self._prepared, self._reference = prepared, readout
        self._begin()
        self._keep(FULL, self._reference)

    def add(self, key: Hashable, output: Any) -> None:
        """The output of the version `key` on the batch that was started."""
        self.put(key, self.task.read(output, self._prepared))

    def put(self, key: Hashable, readout: Readout) -> None:
        """What was read of the version `key` on the batch that was started."""
        self._keep(key, readout)

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process: the scores, not the model."""
        return {key: value for key, value in vars(self).items() if key not in {"task", "_prepared"}}

    def merge(self, other: Tally) -> None:
        """Add the batches of `other`, a tally of the same task on other samples."""
        for key, lists in other._kept.items():
            mine = self._kept.setdefault(key, {})
            for name, parts in lists.items():
                mine.setdefault(name, []).extend(parts)

    def drop(self, keys: Iterable[Hashable]) -> None:
        """Forget versions, such as those that could not be read on every batch."""
        for key in keys:
            self._kept.pop(key, None)

    @abstractmethod
    def scores(self) -> dict[Hashable, dict[str, Tensor]]:
        """For each version, FULL among them, and metric: float64 (samples,), or (1,) for a number of the whole run.

        In the same order for all versions, without the samples that have no position to score. Never NaN.
        """

    @abstractmethod
    def counts(self) -> Tensor:
        """How many predictions the scores of each sample are about: float64 (samples,), in the order of `scores`."""

    @abstractmethod
    def baselines(self) -> dict[str, float]:
        """For each metric, what the best constant answer scores on the same samples, or chance."""

    @abstractmethod
    def _begin(self) -> None:
        """A batch was started: what concerns all versions."""

    @abstractmethod
    def _keep(self, key: Hashable, readout: Readout) -> None: ...

    def _put(self, key: Hashable, values: dict[str, Tensor]) -> None:
        lists = self._kept.setdefault(key, {})
        for name, value in values.items():
            lists.setdefault(name, []).append(value)

    def _joined(self) -> dict[Hashable, dict[str, Tensor]]:
        return {
            key: {name: torch.cat(parts) for name, parts in lists.items()}
            for key, lists in self._kept.items()
        }
