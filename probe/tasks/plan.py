"""What a measurement scores: samples, and the task that the model has on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from rc_probe.data.samples import Samples
from rc_probe.models.load import Loaded

from .base import Task
from .choose import choose_task


@dataclass(frozen=True)
class Plan:
    """samples: the first few of the run; task: None where the model predicts nothing; notes: for the reader."""

    samples: Samples
    task: Task | None
    notes: list[str]

    @classmethod
    def of(cls, loaded: Loaded, samples: Samples, chosen: Any) -> Self:
        """On these samples, as `chosen` says. Raises RcProbeError for labels that cannot be meant."""
        task, notes = choose_task(
            loaded, samples, length=chosen.length, batch_size=chosen.batch_size,
            special_tokens=chosen.special_tokens, seed=chosen.seed,
        )  # fmt: skip
        return cls(samples, task, notes)

    @property
    def scored(self) -> Samples:
        """What batches are made of: the task's own samples, if it has others."""
        return self.task.samples if self.task else self.samples


def first(samples: Samples, count: int) -> Samples:
    """The first samples of a run, with their labels."""
    return replace(samples, items=samples.items[:count], labels=samples.labels and samples.labels[:count])
