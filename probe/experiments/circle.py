"""Two points go round a circle: a one-layer network is fed its own answers, and its tokens stay apart or fall together.

Source: Dong et al. 2021, section 4.3. Its code keeps the skip of the attention in every arm, and its arm with a skip is trained on
another recurrence than it is run with. Here the four arms differ in nothing but the skip of the attention and the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, product
from typing import ClassVar

import torch
from torch import Tensor

from rc_probe.models.own.san import SANConfig, SANForTokenClassification
from rc_probe.results.tables import Column, Row, Table

from .protocol import Claim, Experiment, Frames, SeedRun, Sizes, with_seed
from .training import Recipe, save_model, seeded

PAPER = "Dong et al. 2021, section 4.3"
WIDTHS = (32, 64, 128)
POINTS, RADIUS, APART = 1000, 0.3, 499  # points of the circle, and how many are between the two tokens
ARMS = {"pure": (False, False), "skip": (True, False), "MLP": (False, True), "skip and MLP": (True, True)}
WIDTH = Column("width", "int64", "of the network")
TRAINING = Column("training", "str", "`short` (15 epochs at a rate of 1e-5) or `long` (70 epochs at 1e-4)")
ARM = Column("arm", "str", "what it has beside attention: `pure` (nothing), `skip`, `MLP`, `skip and MLP`")
TABLES = tuple(map(with_seed, (
    Table("trajectories", "Where the two tokens are, step by step, when the network is fed its own answers", (
        WIDTH, TRAINING, ARM,
        Column("step", "int64", "how many steps"),
        Column("x1", "float64", "of the first token"), Column("y1", "float64", "of the first token"),
        Column("x2", "float64", "of the second token"), Column("y2", "float64", "of the second token"),
        Column("distance", "float64", "between the two"),
    )),
    Table("fits", "How well each network does one step", (
        WIDTH, TRAINING, ARM,
        Column("error", "float64", "mean squared distance to the next point, over the points that it was trained on"),
    )),
)))  # fmt: skip


def circle() -> tuple[Tensor, Tensor]:
    """(inputs, targets), (APART, 2 tokens, 2) each: a point of one arc with one of the other, and the next point of both."""
    turn = 2 * math.pi * torch.arange(POINTS, dtype=torch.float64) / POINTS
    points = (RADIUS * torch.stack([turn.cos(), turn.sin()], -1)).float()
    at = torch.arange(APART)
    return tuple(torch.stack([points[at + i], points[at + APART + i]], 1) for i in (0, 1))  # type: ignore[return-value]


@dataclass(frozen=True)
class Training:
    """How long a network is trained, in the order of the points."""

    name: str
    epochs: int
    recipe: Recipe


TRAININGS = Training("short", 15, Recipe(lr=1e-5)), Training("long", 70, Recipe(lr=1e-4))


@dataclass(frozen=True)
class CircleSizes(Sizes):
    """widths: of the networks; batch: points in a step of the training; steps: fed by itself."""

    widths: tuple[int, ...] = WIDTHS
    trainings: tuple[Training, ...] = TRAININGS
    batch: int = 30
    dropout: float = 0.1
    steps: int = 300


def config(width: int, arm: str, dropout: float) -> SANConfig:
    """One block of two heads on points, without positions."""
    skip, mlp = ARMS[arm]
    return SANConfig(
        vocab_size=0, coordinates=2, num_labels=2, max_position_embeddings=0, num_hidden_layers=1, hidden_size=width,
        skip=skip, intermediate_size=width if mlp else 0, dropout=dropout, attention_dropout=dropout,
    )  # fmt: skip


def squared_error(model: SANForTokenClassification, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Squared distance to the targets, the mean over tokens."""
    found: Tensor = (model(points=batch[0]).logits - batch[1]).square().sum(-1).mean()
    return found


def fed_by_itself(model: SANForTokenClassification, start: Tensor, steps: int) -> Iterator[Tensor]:
    """Both tokens (2, 2) at step 0, 1, … `steps`, in float64 from the float32 answers."""
    x = start[None]
    with torch.no_grad():
        for step in range(steps + 1):
            yield x[0].double().cpu()
            x = model(points=x).logits if step < steps else x


def _apart(width: int, arm: str, training: str = "short", step: int = 10) -> Callable[[Frames], float]:
    """The distance of the two tokens, of the tables of a seed; NaN where the width was not run."""

    def number(frames: Frames) -> float:
        rows = frames["trajectories"]
        wanted = {"width": width, "arm": arm, "training": training, "step": step}
        for name, value in wanted.items():
            rows = rows[rows[name] == value]
        return float(rows["distance"].iloc[0]) if len(rows) else math.nan

    return number


def _claims(width: int) -> list[Claim]:
    """Of one width; each number is the distance at step 10."""
    at = f"Width {width}"
    return [
        Claim(f"{at}, short training: without skip and MLP the tokens fall together", PAPER, _apart(width, "pure"), most=1e-3),
        Claim(f"{at}, short training: with the skip they stay apart", PAPER, _apart(width, "skip"), least=0.1),
        Claim(f"{at}, short training: an MLP alone prevents or slows it", PAPER, _apart(width, "MLP"), least=1e-3),
        Claim(f"{at}, long training: without skip and MLP the tokens fall together", PAPER, _apart(width, "pure", "long"), most=1e-3),
    ]  # fmt: skip


class Circle(Experiment[CircleSizes]):
    """Every arm of a width starts from the weights that its seed gives, and sees the same points in the same order."""

    name, title, source = "circle", "Two tokens on a circle", PAPER
    tables = TABLES
    claims: ClassVar = [claim for width in WIDTHS for claim in _claims(width)]
    sizes = CircleSizes(seeds=5)
    quick = CircleSizes(seeds=2, widths=(32,))

    def measure(self, run: SeedRun[CircleSizes]) -> dict[str, list[Row]]:
        ways: list[Row] = []
        fits: list[Row] = []
        inputs, targets = (x.to(run.trainer.device) for x in circle())
        for width, training, arm in product(run.sizes.widths, run.sizes.trainings, ARMS):
            model = self.train(run, width, training, arm)
            where = {"width": width, "training": training.name, "arm": arm}
            if run.folder is not None:
                save_model(model, run.folder / f"width-{width}-{training.name}-{arm.replace(' ', '-')}")
            with torch.no_grad():
                fits.append({**where, "error": float(squared_error(model, (inputs, targets)))})
            for step, both in enumerate(fed_by_itself(model, inputs[0], run.sizes.steps)):
                if step <= 20 or step % 10 == 0:
                    ways.append({**where, "step": step, **_places(both)})
        return {"trajectories": ways, "fits": fits}

    def train(
        self, run: SeedRun[CircleSizes], width: int, training: Training, arm: str
    ) -> SANForTokenClassification:
        """The network of an arm, trained to say the next points."""
        sizes = run.sizes
        with seeded(run.seed):
            model = SANForTokenClassification(config(width, arm, sizes.dropout))
        inputs, targets = (x.to(run.trainer.device) for x in circle())
        parts = list(zip(inputs.split(sizes.batch), targets.split(sizes.batch), strict=True))
        return run.trainer.fit(
            model, cycle(parts), squared_error, training.recipe, steps=training.epochs * len(parts), seed=run.seed,
            what=f"width {width}, {training.name}, {arm}",
        )  # fmt: skip


def _places(both: Tensor) -> Row:
    """both (2 tokens, 2)"""
    (x1, y1), (x2, y2) = both.tolist()
    return {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "distance": float(torch.linalg.norm(both[0] - both[1]))}


EXPERIMENT = Circle()
