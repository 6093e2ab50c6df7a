"""Find the convex hull: of 10 points in the plane, the label says which are its vertices.

Source: Dong et al. 2021, section 4.2. The paper draws .54 as the majority's accuracy; it is about .595. Its code draws
the test sets from the training ones when run twice, and trains with a rate of 1e-5.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from rc_probe.models.own.san import SANConfig

from .labelling.data import Labelled, accuracy, commonest
from .labelling.experiment import Labelling, LabellingSizes, at, guess, longer
from .protocol import Claim, Frames, SeedRun
from .training import Recipe

POINTS, SIDE, SHIFT = (
    10,
    10.0,
    3.3,
)  # points of a set, the square that they are drawn from, the spread of its place
MAJORITY, PLACE = "majority", "best of the point's place"
MANY, CELL, CELLS = (
    20_000,
    1.0,
    60,
)  # sets that guesses are fitted on; squares of the plane, and how many along a side
PAPER = "Dong et al. 2021, section 4.2"


def draw(count: int, generator: torch.Generator) -> Tensor:
    """`count` sets of points (count, POINTS, 2): uniform in a square, which is then moved as a whole."""
    points = SIDE * torch.rand(count, POINTS, 2, generator=generator)
    return points + SHIFT * torch.randn(count, 1, 2, generator=generator)


def vertices(points: Tensor) -> Tensor:
    """(sets, points) int64: 1 for vertices of the convex hull of each set (sets, points, 2), by Qhull."""
    from scipy.spatial import ConvexHull

    labels = torch.zeros(points.shape[:2], dtype=torch.long)
    for row, one in zip(labels, points.double().numpy(), strict=True):
        row[ConvexHull(one).vertices.tolist()] = 1
    return labels


def hull_data(train: int, test: int, seed: int) -> tuple[Labelled, Labelled]:
    """Training and test sets, drawn one after the other from one generator: no two are equal. The same for the same seed."""
    points = draw(train + test, torch.Generator().manual_seed(seed))
    labels = vertices(points)
    whole = Labelled({"points": points}, labels)
    return whole.rows(slice(test, None)), whole.rows(slice(test))


def guesses(fit: Labelled, test: Labelled) -> dict[str, float]:
    """What needs no attention, fitted on `fit`: the commoner label, and the commoner one of the square that a point is in."""

    def place(points: Tensor) -> Tensor:
        x, y = (points / CELL + CELLS / 2).long().clamp(0, CELLS - 1).unbind(-1)
        return x * CELLS + y

    best = commonest(place(fit.inputs["points"]), fit.labels, CELLS**2, 2)
    usual = commonest(torch.zeros_like(fit.labels), fit.labels, 1, 2).expand_as(test.labels)
    return {
        MAJORITY: accuracy(usual, test.labels),
        PLACE: accuracy(best[place(test.inputs["points"])], test.labels),
    }


def _over_majority(frames: Frames) -> float:
    return max((value - guess(frames, MAJORITY) for value in longer(frames, 3)), default=math.nan)


class Hull(Labelling[LabellingSizes]):
    """The network of the paper: 6 blocks of 3 heads, width 84, no positions, no MLP."""

    name, title, source = "hull", "Finding the convex hull", PAPER
    claims: ClassVar = (
        Claim("The whole model finds the vertices of sets that it never saw (accuracy)", PAPER, at, least=0.9),
        Claim("Guessing the majority scores what the paper draws, 0.54", PAPER, lambda f: guess(f, MAJORITY), least=0.53, most=0.55),
        Claim("20 live paths of length 1 score more than 0.65", PAPER, lambda f: at(f, "live", 1, drawn=20), least=0.65),
        Claim("20 live paths of length 3 or more are not much better than the majority: the most that one length has over it", PAPER,
              _over_majority, most=0.05),
        Claim("Length 1 alone, exactly, is better than the majority by", "exact, this package",
              lambda f: at(f, "exact", 1) - guess(f, MAJORITY), least=0.0),
        Claim("Lengths up to 2, exactly, are the whole model, as in sorting: what accuracy they lack", "exact, this package",
              lambda f: at(f) - at(f, "exact", 2, "up_to"), most=0.02),
        Claim("Lengths up to 5, exactly, are the whole model: what accuracy they lack", "exact, this package",
              lambda f: at(f) - at(f, "exact", 5, "up_to"), most=0.02),
    )  # fmt: skip
    sizes = LabellingSizes(seeds=3, train=10_000, test=150, epochs=8, batch=30, recipe=Recipe(lr=3e-4))
    quick = sizes.changed(seeds=1, epochs=4, test=50)

    def data(self, run: SeedRun[LabellingSizes]) -> tuple[Labelled, Labelled]:
        return hull_data(run.sizes.train, run.sizes.test, run.seed)

    def config(self, train: Labelled) -> SANConfig:
        return SANConfig(
            vocab_size=0, coordinates=2, deep_entry=True, hidden_size=84, num_attention_heads=3, max_position_embeddings=0, num_labels=2,
        )  # fmt: skip

    def baselines(self, train: Labelled, test: Labelled, run: SeedRun[LabellingSizes]) -> dict[str, float]:
        points = draw(MANY, torch.Generator().manual_seed(1_000_000 + run.seed))
        return guesses(Labelled({"points": points}, vertices(points)), test)


EXPERIMENT = Hull()
