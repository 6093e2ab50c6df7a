"""What sorting, hulls and memorizing share: train a network with skips, then measure the whole of it and its paths."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

import pandas as pd
import torch
from torch import Tensor

from rc_probe.data.batches import Batch
from rc_probe.data.samples import Samples
from rc_probe.experiments.protocol import Experiment, Frames, SeedRun, Sizes, with_seed
from rc_probe.experiments.training import Recipe, epochs, save_model, seeded
from rc_probe.hooks.attach import find_structure
from rc_probe.measures.paths.paths import PATHS
from rc_probe.models.own.san import SANConfig, SANForTokenClassification
from rc_probe.paths.effectiveness import Budget, effectiveness
from rc_probe.results.tables import Column, Row, Table
from rc_probe.tasks.base import Prepared, whole
from rc_probe.tasks.prediction import Prediction

from .data import NONE, Labelled

DRAWN = (5, 20)  # paths of an estimate, as in the paper
BASELINES = with_seed(Table("baselines", "What needs no path", (
    Column("baseline", "str", "how labels are guessed"),
    Column("accuracy", "float64", "share of the labels that are guessed, on the sequences that the model is measured on"),
)))  # fmt: skip


@dataclass(frozen=True)
class LabellingSizes(Sizes):
    """train, test: sequences; measured: of the test ones, those that paths are measured on."""

    train: int
    test: int
    epochs: int
    batch: int
    recipe: Recipe
    at_once: int = 100  # sequences in a pass of the measurement
    repeats: int = 5  # estimates of each number of paths drawn


S = TypeVar("S", bound=LabellingSizes)


@dataclass
class Labels(Prediction):
    """The label of every real token of made sequences. given (sequences, tokens)."""

    given: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    name: str = "labels of tokens"

    def __post_init__(self) -> None:
        self.metrics = ("agreement", "accuracy", "loss")

    def prepare(self, batch: Batch) -> Prepared:
        prepared = whole(batch)
        here = self.given[prepared.samples.start : prepared.samples.stop].to(prepared.row.device)
        row, column = torch.nonzero(here != NONE, as_tuple=True)
        return replace(prepared, row=row, column=column, targets=here[row, column])


class Labelling(Experiment[S]):
    """Subclasses say what the data are, what the network is, and what can be guessed."""

    tables: ClassVar = (with_seed(PATHS), BASELINES)

    @abstractmethod
    def data(self, run: SeedRun[S]) -> tuple[Labelled, Labelled]:
        """What is trained on, and what is measured: the same for the same seed."""

    @abstractmethod
    def config(self, train: Labelled) -> SANConfig:
        """The network."""

    @abstractmethod
    def baselines(self, train: Labelled, test: Labelled, run: SeedRun[S]) -> dict[str, float]:
        """What guesses score on `test`, by their names."""

    def train(
        self, run: SeedRun[S], train: Labelled, config: SANConfig | None = None
    ) -> SANForTokenClassification:
        """The network, trained; in eval mode."""
        sizes = run.sizes
        with seeded(run.seed):
            model = SANForTokenClassification(config or self.config(train))

        def batches() -> Iterator[Labelled]:
            for rows in epochs(len(train.labels), sizes.batch, run.seed):
                yield train.rows(rows)

        def loss(model: SANForTokenClassification, batch: Labelled) -> Tensor:
            there = {name: value.to(run.trainer.device) for name, value in batch.inputs.items()}
            found: Tensor = model(**there, labels=batch.labels.to(run.trainer.device)).loss
            return found

        steps = sizes.epochs * math.ceil(len(train.labels) / sizes.batch)
        return run.trainer.fit(model, batches(), loss, sizes.recipe, steps=steps, seed=run.seed)

    def measure(self, run: SeedRun[S]) -> dict[str, list[Row]]:
        train, test = self.data(run)
        model = self.train(run, train)
        if run.folder is not None:
            self.save(model, test, run)
        guesses = self.baselines(train, test, run)
        return {
            "paths": path_rows(model, test, run),
            "baselines": [{"baseline": name, "accuracy": value} for name, value in guesses.items()],
        }

    def save(self, model: SANForTokenClassification, test: Labelled, run: SeedRun[S]) -> None:
        """The model's folder, which loads like any other."""
        assert run.folder is not None
        save_model(model, run.folder / "model")


def path_rows(model: SANForTokenClassification, test: Labelled, run: SeedRun[S]) -> list[Row]:
    """Rows of the table `paths`: exact, sampled and live, and the whole model."""
    inputs = {name: value.to(run.trainer.device) for name, value in test.inputs.items()}
    batches = []
    for start in range(0, len(test.labels), run.sizes.at_once):
        part = {name: value[start : start + run.sizes.at_once] for name, value in inputs.items()}
        mask = part.get("attention_mask")
        batches.append(Batch(part, None if mask is None else mask.bool(), start))
    structure = find_structure(model, {name: value[:2] for name, value in inputs.items()})
    task = Labels(model, Samples("text", "made", []), given=test.labels)
    run.trainer.report("paths", 0, 1)
    return effectiveness(structure, task, batches, Budget(DRAWN, run.sizes.repeats, seed=run.seed)).rows


# ---- what claims read


def at(
    frames: Frames,
    estimator: str = "full",
    length: int | None = None,
    scope: str = "alone",
    drawn: int | None = None,
) -> float:
    """The accuracy in the table `paths`; NaN where there is none."""
    rows = frames["paths"]
    rows = rows[(rows["metric"] == "accuracy") & (rows["estimator"] == estimator)]
    if length is not None:
        rows = rows[(rows["length"] == length) & (rows["scope"] == scope)]
    if drawn is not None:
        rows = rows[rows["drawn"] == drawn]
    return float(rows["mean"].iloc[0]) if len(rows) else math.nan


def guess(frames: Frames, name: str) -> float:
    """The accuracy of a baseline."""
    rows: pd.DataFrame = frames["baselines"]
    return float(rows.loc[rows["baseline"] == name, "accuracy"].iloc[0])


def longer(frames: Frames, least: int, drawn: int = DRAWN[-1]) -> list[float]:
    """The accuracies of live paths of at least this length."""
    lengths = frames["paths"]["length"].dropna()
    return [at(frames, "live", k, drawn=drawn) for k in range(least, int(lengths.max()) + 1)]
