"""What two models predict, at the same positions of the same samples, and how well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rc_probe.data.batches import Batch
from rc_probe.data.samples import Samples
from rc_probe.hooks.errors import RcProbeError
from rc_probe.metrics.intervals import change_interval
from rc_probe.paths.summaries import mean_of
from rc_probe.processes.world import World
from rc_probe.registry import CHANGE
from rc_probe.results.tables import Row
from rc_probe.tasks import FULL, Prepared, Task, choose_task
from rc_probe.tasks.drift import drift_of
from rc_probe.tasks.prediction import Prediction

from .options import DiffOptions
from .pair import Pair

SECOND = "B"


@dataclass
class Predictions:
    """The answers of both, scored by the task of A: A is the model that B is to agree with.

    name_b: for errors
    """

    task: Task
    task_b: Task
    name_b: str

    def __post_init__(self) -> None:
        self.tally = self.task.tally()
        self._drifts = drift_of(self.task), drift_of(self.task_b)
        self._drifted: list[tuple[int, Tensor]] = []  # with the number of the first sample

    def take(self, prepared: Prepared, output_a: Any, output_b: Any) -> None:
        """What both said to a batch."""
        self.tally.start(prepared, output_a)
        try:
            self.tally.put(SECOND, self.task_b.read(output_b, prepared))
        except RcProbeError as error:
            raise RcProbeError(error.what, where=self.name_b, todo=error.todo) from error
        one, other = self._drifts
        if one is not None and other is not None:
            mine, its = one.read(output_a, prepared), other.read(output_b, prepared)
            if mine.shape == its.shape:
                self._drifted.append((prepared.samples.start, one.between(mine, its, prepared)))

    def together(self, world: World) -> None:
        """Take in what the other processes were told."""
        if world.size == 1:
            return
        whole = self.task.tally()
        parts = world.gather((self.tally, self._drifted), "predictions")
        for tally, _ in parts:
            whole.merge(tally)
        self.tally = whole
        self._drifted = sorted((each for _, drifted in parts for each in drifted), key=lambda each: each[0])

    def rows(self) -> Iterator[Row]:
        """Rows of the table `differences`."""
        scores, weights = self.tally.scores(), self.tally.counts()
        for metric, its in scores[SECOND].items():
            mine = scores[FULL][metric]
            known = weights if len(weights) == len(its) else None
            if metric == "agreement":
                yield _row(metric, float(its.mean()), its, len(weights))
            else:
                change = mean_of(its, metric, known) - mean_of(mine, metric, known)
                yield _row(CHANGE + metric, float(change), its - mine, len(weights))
        drift = self._drifts[0]
        if drift is not None and self._drifted:
            values = drift.by_sample(torch.cat([values for _, values in self._drifted]))
            yield _row(drift.metric, float(values.mean()), values, len(values))

    def facts(self) -> dict[str, Any]:
        """The task, and of each of its metrics both values and the paired interval of their difference."""
        scores, weights = self.tally.scores(), self.tally.counts()
        found: dict[str, Any] = {
            "task": self.task.name,
            "samples": len(weights),
            "predictions": int(weights.sum()),
        }
        for metric, its in scores[SECOND].items():
            mine, known = scores[FULL][metric], weights if len(weights) == len(its) else None
            low, high = change_interval(
                its.numpy(), mine.numpy(), metric, None if known is None else known.numpy()
            )
            values = {"a": float(mean_of(mine, metric, known)), "b": float(mean_of(its, metric, known))}
            found[metric] = {**values, "low": low, "high": high}
        return found


def _row(metric: str, mean: float, values: Tensor, count: int) -> Row:
    std = float(values.std()) if len(values) > 1 else None
    return {
        "component": "predictions", "block": None, "layer": None, "metric": metric, "mean": mean, "std": std, "count": count,
    }  # fmt: skip


def choose_predictions(
    pair: Pair, samples: Samples, chosen: DiffOptions
) -> tuple[Predictions | None, list[str]]:
    """What both are scored by, and notes. None where one predicts nothing, or they predict different things."""
    found = [
        choose_task(
            side.loaded, samples, length=side.made.length or chosen.length, batch_size=chosen.batch_size,
            special_tokens=chosen.special_tokens, seed=chosen.seed,
        )
        for side in (pair.a, pair.b)
    ]  # fmt: skip
    (task, notes), (task_b, notes_b) = found
    told = list(dict.fromkeys([*notes, *notes_b]))
    if task is None or task_b is None:
        return None, told
    if why := _unlike(task, task_b):
        return None, [*told, f"Predictions were not compared: {why}."]
    return Predictions(task, task_b, pair.b.name), told


def _unlike(a: Task, b: Task) -> str:
    """Why the answers of the two cannot be compared; "" where they can."""
    if type(a) is not type(b) or a.metrics != b.metrics:
        return f"{a.name} is what the first predicts, {b.name} the second"
    if type(a).__name__ in ("Prediction", "TokenClasses"):
        labels = [getattr(task.model.config, "id2label", None) for task in (a, b)]
        if labels[0] != labels[1]:
            return "their labels differ"
    if isinstance(a, Prediction) and getattr(a, "mask_id", None) != getattr(b, "mask_id", None):
        return "their mask tokens differ"
    return ""


def on_the_data(task: Task, samples: Samples, batch: Batch) -> bool:
    """Whether the task runs on the samples as they are: no masks, no halves of texts."""
    return task.samples is samples and task.prepare(batch).inputs is batch.inputs
