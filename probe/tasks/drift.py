"""How far the answers of a version of the model are from the full model's, where nothing says what is right.

drift = drift_of(task)                  # None where the task has a loss, which says more
plain = drift.read(output, prepared)    # of the full model, kept for the versions
drift.between(plain, drift.read(other, prepared), prepared)   # float64, one number a row of the batch
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from .base import Prepared, Task
from .prediction import Prediction
from .retrieval import Embedding


class Drift(ABC):
    """metric: its name in the registry. Answers leave a batch as small tensors on the CPU."""

    metric: str

    @abstractmethod
    def read(self, output: Any, prepared: Prepared) -> Tensor:
        """The answers in an output."""

    @abstractmethod
    def between(self, plain: Tensor, other: Tensor, prepared: Prepared) -> Tensor:
        """float64, from the plain answers to others: for each row of the batch that has any."""

    def by_sample(self, values: Tensor) -> Tensor:
        """The numbers of all rows of a run, in their order, as one for each sample."""
        return values


class Divergence(Drift):
    """Σ p ln(p / q) in nats, p plain: the mean over the positions of a row."""

    metric = "kl"

    def __init__(self, task: Prediction) -> None:
        self.task = task

    def read(self, output: Any, prepared: Prepared) -> Tensor:
        """(P, classes): log-probabilities."""
        logits = self.task.head(output).detach()
        row = prepared.row.to(logits.device)
        where = (row,) if prepared.column is None else (row, prepared.column.to(logits.device))
        return logits[where].cpu().double().log_softmax(-1)

    def between(self, plain: Tensor, other: Tensor, prepared: Prepared) -> Tensor:
        each = (plain.exp() * (plain - other)).sum(-1).clamp_min(0)  # below 0 by rounding alone
        row = prepared.row.cpu()
        counts = torch.bincount(row, minlength=prepared.rows)
        sums = torch.zeros(prepared.rows, dtype=torch.float64).index_add(0, row, each)
        return (sums / counts)[counts > 0]


class Distance(Drift):
    """1 − cos(e, e′) of embeddings, which are no probabilities; as ½ ‖e − e′‖² of unit vectors, so that equal ones have 0."""

    metric = "embedding_distance"

    def __init__(self, task: Embedding) -> None:
        self.task = task

    def read(self, output: Any, prepared: Prepared) -> Tensor:
        """(rows, dim), of length 1."""
        return self.task.read(output, prepared)["embedding"].double()

    def between(self, plain: Tensor, other: Tensor, prepared: Prepared) -> Tensor:
        return (plain - other).square().sum(-1) / 2

    def by_sample(self, values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, 2)).mean(1) if self.task.paired else values


def drift_of(task: Task | None) -> Drift | None:
    """What stands for the loss where the task has none; None where it has one."""
    if isinstance(task, Embedding):
        return Distance(task)
    if isinstance(task, Prediction) and "loss" not in task.metrics:
        return Divergence(task)
    return None
