"""Nearest neighbours by attention: heads of low rank, however many, do not do what one head of full rank does.

Source: Amsel, Yehudai, Bruna 2024 (arXiv 2407.16153). Points lie on the unit sphere; the answer to a query is the point that is
nearest to it, or for points among themselves the one farthest from each. The error is the squared distance to the right point. A head of
rank r scores by ⟨Q y, K x⟩ / √r with Q, K of r × d; its values are free. Fresh points in every step, so that nothing is learned by heart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from torch import nn

from rc_probe.results.tables import Column, Row, Table

from .nearest_networks import FARTHEST, NEAREST, Heads, Points, Task, draw, network, plateau, squared_error
from .protocol import Claim, Experiment, Frames, SeedRun, Sizes, with_seed
from .training import Recipe, seeded

PAPER = "Amsel et al. 2024"
TEST = 10_000  # queries that an error is measured on
TABLES = tuple(map(with_seed, (
    Table("errors", "Squared error of trained attention, by rank and number of heads", (
        Column("target", "str", "`nearest`: of a query of its own; `farthest`: from each of the points themselves"),
        Column("points", "str", "how they are drawn: `uniform`, `orthogonal`, `doubled` (each with its opposite)", "drawn"),
        Column("dim", "int64", "d, of a point"),
        Column("count", "int64", "N, how many points there are", "points"),
        Column("layers", "int64", "0: one layer of heads and nothing else; more: encoder layers, with skips, MLPs and norms"),
        Column("rank", "int64", "r, of a head"),
        Column("heads", "int64", "H, of a layer"),
        Column("scratch", "int64", "dimensions beside the point that tell the positions, as scratch space"),
        Column("parameters", "int64", "in queries and keys of a layer, 2 r d H"),
        Column("error", "float64", "mean squared distance to the right point"),
        Column("law", "float64", "the plateau ½ (1 − d κ²) of heads that add up to a function linear in the query; of two orthogonal points"),
    )),
    Table("truncation", "Error of the trained head of full rank, its scores cut to a rank afterwards", (
        Column("rank", "int64", "of Qᵀ K, by singular values"), Column("error", "float64", "mean squared distance to the right point"),
    )),
    Table("full_head", "The trained head of full rank", (
        Column("quantity", "str", "`cosine`: of Qᵀ K with the identity; `ratio`: largest singular value over the smallest; `effective_rank`"),
        Column("value", "float64", "what it is"),
    )),
)))  # fmt: skip


# ---- the experiment


@dataclass(frozen=True)
class NearestSizes(Sizes):
    """steps, batch: of a single layer; deep: steps of encoders and of sets of more than two points.

    contexts: numbers of points that encoders get; depths: numbers of layers
    """

    steps: int
    deep: int
    batch: int = 256
    contexts: tuple[int, ...] = (4, 16, 32)
    depths: tuple[int, ...] = (1, 2, 3)
    full: bool = True  # with other distributions, depths and contexts


FULL = Task(rank=16, heads=1)


def single(sizes: NearestSizes) -> list[Task]:
    """One layer: all splits of 512 parameters, rank-1 heads in any number; then other widths, targets and distributions."""
    tasks = [Task(r, 16 // r) for r in (1, 2, 4, 8, 16)] + [Task(1, h) for h in (1, 4, 64)]
    if not sizes.full:
        return tasks
    tasks += [Task(1, h, dim=8) for h in (1, 2, 4, 8, 32)] + [Task(8, 1, dim=8)]
    for rank in (1, 4, 16):
        tasks += [Task(rank, 16 // rank, points="uniform")]
        tasks += [Task(rank, 16 // rank, FARTHEST, points, count=8) for points in ("uniform", "doubled")]
    return tasks


def deep(sizes: NearestSizes) -> list[Task]:
    """Encoders on the farthest of uniform points: rank against depth, against context length, with scratch space."""
    usual = sizes.contexts[1]
    made = [
        Task(rank, 16 // rank, FARTHEST, "uniform", 16, count, layers)
        for rank in (1, 4, 16)
        for count, layers in [(usual, depth) for depth in sizes.depths]
        + [(count, 2) for count in sizes.contexts]
    ]
    made += [Task(rank, 16 // rank, FARTHEST, "uniform", 16, usual, 2, scratch=16) for rank in (1, 4)]
    return list(dict.fromkeys(made))


# ---- what claims read


def _error(frames: Frames, **columns: int | str) -> float:
    """The error of the only row with these columns, of the others those of Task; NaN where it was not trained."""
    wanted = {
        "target": NEAREST,
        "points": "orthogonal",
        "dim": 16,
        "count": 2,
        "layers": 0,
        "scratch": 0,
    } | columns
    rows: pd.DataFrame = frames["errors"]
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    return float(rows["error"].iloc[0]) if len(rows) else math.nan


def _over_splits(frames: Frames) -> float:
    return min(_error(frames, rank=r, heads=16 // r) for r in (1, 2, 4, 8)) / _error(frames, rank=16, heads=1)


def _far(frames: Frames, rank: int) -> float:
    return _error(frames, rank=rank, heads=16 // rank, target=FARTHEST, points="uniform", count=8)


def _encoder(frames: Frames, rank: int, layers: int = 2, count: int = 16, scratch: int = 0) -> float:
    wanted = {"rank": rank, "heads": 16 // rank, "layers": layers, "count": count, "scratch": scratch}
    return _error(frames, target=FARTHEST, points="uniform", **wanted)


def _most(frames: Frames) -> int:
    return int(frames["errors"]["count"].max())


def _cosine(frames: Frames) -> float:
    return float(frames["full_head"].set_index("quantity")["value"]["cosine"])


def _cut(frames: Frames, rank: int) -> float:
    return float(frames["truncation"].set_index("rank")["error"][rank])


class Nearest(Experiment[NearestSizes]):
    """Every network is trained alike: Adam with warm-up and a cosine."""

    name, title, source = "nearest", "Nearest neighbours by heads of low rank", PAPER
    tables = TABLES
    claims: ClassVar = (
        Claim("One head of full rank beats every split of its 512 parameters: smallest error of a split over its own", f"{PAPER}, theorem 2",
              _over_splits, least=2),
        Claim("16 heads of rank 1 sit at the plateau, 0.172: their error", f"{PAPER}, theorem 2", lambda f: _error(f, rank=1, heads=16),
              least=0.17, most=0.2),
        Claim("Four times as many heads of rank 1 gain nearly nothing: their error less", f"{PAPER}, theorem 2",
              lambda f: _error(f, rank=1, heads=16) - _error(f, rank=1, heads=64), most=0.02),
        Claim("64 heads of rank 1 reach the plateau and not less: their error less ½ (1 − d κ²)", "derived here",
              lambda f: _error(f, rank=1, heads=64) - plateau(16), least=-0.005, most=0.01),
        Claim("The trained head of full rank compares by c I: cosine of Qᵀ K with the identity", f"{PAPER}, fact 1", _cosine, least=0.99),
        Claim("Every dimension is needed: cut to half of its rank afterwards, the head's error grows by", "measured here",
              lambda f: _cut(f, 8) - _cut(f, 16), least=0.2),
        Claim("Farthest of 8 uniform points, one layer: error of rank 4 over that of full rank", f"{PAPER}, figure 1",
              lambda f: _far(f, 4) / _far(f, 16), least=2),
        Claim("Encoders on 16 points: three layers of rank 1 do not do what one layer of full rank does, error more by", f"{PAPER}, figure 1",
              lambda f: _encoder(f, 1, layers=3) - _encoder(f, 16, layers=1), least=0.1),
        Claim("Encoders on 16 points: depth helps rank 1, error of one layer less that of three", f"{PAPER}, figure 1",
              lambda f: _encoder(f, 1, layers=1) - _encoder(f, 1, layers=3), least=0.05),
        Claim("Encoders of rank 1, two layers: many points are harder than few, error on most less that on 4", f"{PAPER}, conjecture 6",
              lambda f: _encoder(f, 1, count=_most(f)) - _encoder(f, 1, count=4), least=0.1),
        Claim("Encoders of rank 4, two layers: positions as scratch space lower the error by", f"{PAPER}, section 6",
              lambda f: _encoder(f, 4) - _encoder(f, 4, scratch=16), least=0.02),
    )  # fmt: skip
    sizes = NearestSizes(seeds=3, steps=1500, deep=600)
    quick = NearestSizes(seeds=1, steps=1000, deep=300, full=False)

    def measure(self, run: SeedRun[NearestSizes]) -> dict[str, list[Row]]:
        rows: list[Row] = []
        head: Heads | None = None
        tasks = [*single(run.sizes), *(deep(run.sizes) if run.sizes.full else ())]
        for number, task in enumerate(tasks, 1):
            model = self.train(task, run, f"network {number} of {len(tasks)}")
            rows.append(_columns(task) | {"error": error_of(model, task, run)})
            if task == FULL and isinstance(model, Heads):
                head = model
                if run.folder is not None:
                    run.folder.mkdir(parents=True, exist_ok=True)
                    torch.save(model.state_dict(), run.folder / "full_head.pt")
        assert head is not None
        return {"errors": rows, "truncation": list(truncations(head, run)), "full_head": list(facts(head))}

    def train(self, task: Task, run: SeedRun[NearestSizes], what: str = "training") -> nn.Module:
        """The network of a task, trained."""
        sizes, generator = run.sizes, torch.Generator().manual_seed(run.seed)
        with seeded(run.seed):
            model = network(task)
        hard = task.count > 2
        batch = max(32, sizes.batch * 2 // task.count) if hard else sizes.batch
        recipe = Recipe(0.01 if task.layers else 0.03, "cosine", 0.05, (0.9, 0.95))

        def batches() -> Iterator[Points]:
            while True:
                yield Points(*(x.to(run.trainer.device) for x in draw(task, batch, generator)))

        return run.trainer.fit(
            model,
            batches(),
            squared_error,
            recipe,
            steps=sizes.deep if hard else sizes.steps,
            seed=run.seed,
            what=what,
        )


def error_of(model: nn.Module, task: Task, run: SeedRun[NearestSizes]) -> float:
    """On points that are drawn by another seed than those of the training."""
    generator = torch.Generator().manual_seed(run.seed + 1_000_000)
    sets = max(1, TEST // (1 if task.target == NEAREST else task.count))
    with torch.no_grad():
        parts = [
            float(
                squared_error(model, Points(*(x.to(run.trainer.device) for x in draw(task, 500, generator))))
            )
            for _ in range(math.ceil(sets / 500))
        ]
    return sum(parts) / len(parts)


def _columns(task: Task) -> Row:
    return {
        "target": task.target, "points": task.points, "dim": task.dim, "count": task.count, "layers": task.layers,
        "rank": task.rank, "heads": task.heads, "scratch": task.scratch, "parameters": task.parameters, "law": task.law,
    }  # fmt: skip


def truncations(head: Heads, run: SeedRun[NearestSizes]) -> Iterator[Row]:
    """The error with Qᵀ K cut to each rank by its singular values."""
    product = (head.query[0].mT @ head.key[0]).detach().double()
    left, sizes, right = torch.linalg.svd(product)
    for rank in range(len(sizes) + 1):
        cut = Heads(FULL.dim, FULL.rank, 1).to(product.device)
        root = sizes[:rank].sqrt()
        with torch.no_grad():
            for mine, part in (
                (cut.query, (left[:, :rank] * root).mT),
                (cut.key, root[:, None] * right[:rank]),
            ):
                mine.zero_()
                mine[0, :rank] = part.float()
            cut.value.copy_(head.value)
        yield {"rank": rank, "error": error_of(cut, FULL, run)}


def facts(head: Heads) -> Iterator[Row]:
    product = (head.query[0].mT @ head.key[0]).detach().double()
    sizes = torch.linalg.svdvals(product)
    share = sizes / sizes.sum()
    values = {
        "cosine": float(product.trace() / (torch.linalg.norm(product) * math.sqrt(len(product)))),
        "ratio": float(sizes[0] / sizes[-1]),
        "effective_rank": float(torch.exp(-(share * share.log()).sum())),
    }
    for name, value in values.items():
        yield {"quantity": name, "value": value}


EXPERIMENT = Nearest()
