"""What a norm does to collapse, where the answer is known: two tokens, equilibria of every rank, orthogonal values.

Source: Wu et al. 2024 (arXiv 2405.18781), theorems 1 to 3 and figure 1; the constructions are ours. Tokens are rows. A layer is
X ← D A X W: A is attention, W the value matrix, D scales every row to length 1 (the norm) or is left out. Nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from torch import Tensor

from rc_probe.results.tables import Column, Row, Table

from .protocol import Claim, Experiment, Frames, SeedRun, Sizes, with_seed

PAPER = "Wu et al. 2024"
EVERY = 5  # layers between two rows
CONVERGED = 1e-6  # of singular values after many layers, relative to the largest
NORM = Column("norm", "bool", "whether every row is scaled to length 1 after each layer")
WEIGHT = Column("weight", "float64", "w, how strongly the value matrix mixes coordinates")
SIZE = (Column("tokens", "int64", "how many tokens"), Column("dim", "int64", "how long a token is"))
TABLES = tuple(map(with_seed, (
    Table("two_tokens", "Where the second of two tokens ends, by where it starts; the first is at (0, 1)", (
        WEIGHT, NORM,
        Column("start", "float64", "angle of the second token at the start, in degrees from the first coordinate"),
        Column("cosine", "float64", "between the two tokens at the end"),
    )),
    Table("equilibria", "Equilibria of every rank under causal uniform attention", (
        *SIZE, WEIGHT,
        Column("rank", "int64", "of the tokens, by singular values"),
        Column("wanted", "int64", "that it was built for", "built for rank"),
        Column("residual", "float64", "largest change of a coordinate in one layer"),
        Column("growth", "float64", "spectral radius of the layer at the equilibrium: above 1 it is not stable"),
    )),
    Table("sinks", "Where random tokens end that see the first token and themselves", (
        *SIZE, WEIGHT,
        Column("start", "int64", "which random start"),
        Column("rank", "int64", "of the tokens at the end"),
    )),
    Table("orthogonal", "Distance from equal tokens with orthogonal value matrices and the norm, by layer", (
        Column("mask", "str", "`complete`, `causal`, or `neighbours`: one token to each side"),
        Column("layer", "int64", "how many layers"),
        Column("residual", "float64", "‖X − 1 x̄ᵀ‖ / ‖X‖, Frobenius norms"),
    )),
)))  # fmt: skip


# ---- the dynamics


def layer(x: Tensor, attention: Tensor, values: Tensor, *, norm: bool = True) -> Tensor:
    """One layer, (…, tokens, dim) -> the same; attention (…, tokens, tokens), values (dim, dim)."""
    mixed = attention @ x @ values
    return mixed / torch.linalg.vector_norm(mixed, dim=-1, keepdim=True) if norm else mixed


def causal(tokens: int) -> Tensor:
    """Uniform attention over oneself and all before, (tokens, tokens)."""
    below = torch.ones(tokens, tokens, dtype=torch.float64).tril()
    return below / below.sum(1, keepdim=True)


def sink(tokens: int) -> Tensor:
    """Uniform attention over the first token and oneself."""
    both = torch.eye(tokens, dtype=torch.float64)
    both[:, 0] = 1
    return both / both.sum(1, keepdim=True)


def shear(dim: int, weight: float) -> Tensor:
    """I + w N, where N moves each coordinate to the next."""
    return torch.eye(dim, dtype=torch.float64) + weight * torch.diag(
        torch.ones(dim - 1, dtype=torch.float64), 1
    )


def equilibrium(tokens: int, dim: int, rank: int, weight: float) -> Tensor:
    """Tokens (tokens, dim) of this rank that causal uniform attention with values I + w N leaves where they are.

    The first are e_d, which the values keep. Each further token x cancels what those before it bring: w x N = −λ x', where x' is
    the token before and λ its growth: m behind the m first tokens, 1 from then on. Its last coordinate makes it of length 1.
    """
    first = tokens - rank + 1
    x = torch.zeros(tokens, dim, dtype=torch.float64)
    x[:first, -1] = 1
    for i in range(first, tokens):
        growth = first if i == first else 1
        x[i, :-1] = -growth * x[i - 1, 1:] / weight
        x[i, -1] = -(1 - x[i].square().sum()).sqrt()
    return x


def sphere(generator: torch.Generator, *shape: int) -> Tensor:
    x = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return torch.nn.functional.normalize(x, dim=-1)


def growth_at(x: Tensor, attention: Tensor, values: Tensor) -> float:
    """Spectral radius of the derivative of one layer at `x`."""
    derivative = torch.func.jacrev(lambda flat: layer(flat.view_as(x), attention, values).flatten())(
        x.flatten()
    )
    return float(torch.linalg.eigvals(derivative).abs().max())


# ---- the experiment


@dataclass(frozen=True)
class EquilibriaSizes(Sizes):
    """starts: of the second of two tokens; layers: that they go through; sinks: random starts of the sink mask."""

    starts: int = 300
    layers: int = 400
    sinks: int = 30
    weights: tuple[float, ...] = (1.0, 2.0, 4.0)
    shapes: tuple[tuple[int, int], ...] = ((2, 2), (4, 4), (8, 8), (6, 3), (16, 8))


def two_tokens(sizes: EquilibriaSizes, generator: torch.Generator) -> Iterator[Row]:
    turns = torch.arange(sizes.starts, dtype=torch.float64) + torch.rand(1, generator=generator)
    angles = 2 * math.pi * turns / sizes.starts  # all around, from a random place
    second = torch.stack([angles.cos(), angles.sin()], -1)
    first = torch.tensor([0.0, 1.0], dtype=torch.float64).expand_as(second)
    for weight in sizes.weights:
        for norm in (True, False):
            x = torch.stack([first, second], 1)  # (starts, 2, 2)
            for _ in range(sizes.layers):
                x = layer(x, causal(2), shear(2, weight), norm=norm)
            cosines = torch.cosine_similarity(x[:, 0], x[:, 1])
            for angle, cosine in zip(angles.rad2deg().tolist(), cosines.tolist(), strict=True):
                yield {"weight": weight, "norm": norm, "start": angle, "cosine": cosine}


def of_every_rank(sizes: EquilibriaSizes) -> Iterator[Row]:
    for tokens, dim in sizes.shapes:
        weight = float(tokens + 1)
        attention, values = causal(tokens), shear(dim, weight)
        for rank in range(1, min(tokens, dim) + 1):
            x = equilibrium(tokens, dim, rank, weight)
            off = (layer(x, attention, values) - x).abs().max()
            yield {
                "tokens": tokens, "dim": dim, "weight": weight, "rank": int(torch.linalg.matrix_rank(x)), "wanted": rank,
                "residual": float(off), "growth": growth_at(x, attention, values),
            }  # fmt: skip


def sinks(sizes: EquilibriaSizes, generator: torch.Generator) -> Iterator[Row]:
    for tokens, dim, weight in ((16, 8, 2.0), (64, 16, 2.0), (64, 16, 8.0)):
        values = torch.eye(dim, dtype=torch.float64)
        values[:-1, -1] = weight
        x = sphere(generator, sizes.sinks, tokens, dim)
        x[:, 0] = torch.eye(dim, dtype=torch.float64)[-1]
        for _ in range(sizes.layers):
            x = layer(x, sink(tokens), values)
        for start, rank in enumerate(torch.linalg.matrix_rank(x, rtol=CONVERGED).tolist()):
            yield {"tokens": tokens, "dim": dim, "weight": weight, "start": start, "rank": rank}


def orthogonal(sizes: EquilibriaSizes, generator: torch.Generator) -> Iterator[Row]:
    """32 tokens of width 32; queries, keys and values are drawn anew in each layer."""
    size = 32
    ones = torch.ones(size, size)
    masks = {"complete": ones, "causal": ones.tril(), "neighbours": ones.tril(1).triu(-1)}
    start = sphere(generator, size, size)
    for name, mask in masks.items():
        x, own = start, torch.Generator().manual_seed(generator.initial_seed())
        for count in range(sizes.layers + 1):
            rest = torch.linalg.norm(x - x.mean(0)) / torch.linalg.norm(x)
            if count % EVERY == 0:
                yield {"mask": name, "layer": count, "residual": float(rest)}
            query, key, values = torch.randn(3, size, size, dtype=torch.float64, generator=own)
            scores = (x @ query / size**0.5) @ (x @ key / size**0.5).T
            pattern = scores.masked_fill(mask == 0, -math.inf).softmax(-1)
            x = layer(x, pattern, torch.linalg.qr(values)[0])


# ---- what claims read


def _kept(frames: Frames, weight: float, *, norm: bool) -> pd.Series:
    """Cosines at the end of the starts that do not collapse."""
    rows = frames["two_tokens"]
    cosines = rows.loc[(rows["weight"] == weight) & (rows["norm"] == norm), "cosine"]
    return cosines[cosines < 0.999]


def _share(frames: Frames, weight: float, *, norm: bool = True) -> float:
    rows = frames["two_tokens"]
    return len(_kept(frames, weight, norm=norm)) / int(
        ((rows["weight"] == weight) & (rows["norm"] == norm)).sum()
    )


def _off(frames: Frames, weight: float) -> float:
    """How far the cosine of any start that keeps both tokens apart is from −√(1 − 1/w²)."""
    return float((_kept(frames, weight, norm=True) + math.sqrt(1 - weight**-2)).abs().max())


def _wrong_ranks(frames: Frames) -> int:
    rows = frames["equilibria"]
    return int((rows["rank"] != rows["wanted"]).sum())


def _last(frames: Frames, mask: str) -> float:
    rows = frames["orthogonal"]
    return float(rows.loc[rows["mask"] == mask, "residual"].iloc[-1])


def _ranks(frames: Frames, tokens: int, weight: float) -> pd.Series:
    rows = frames["sinks"]
    return rows.loc[(rows["tokens"] == tokens) & (rows["weight"] == weight), "rank"]


class Equilibria(Experiment[EquilibriaSizes]):
    """Seeds are those of the random starts and matrices."""

    name, title, source = "equilibria", "Known answers of attention with a norm", PAPER
    tables = TABLES
    claims: ClassVar = (
        Claim("Two tokens, w = 2, with the norm: cosine where they stay apart, less −√3/2", f"{PAPER}, figure 1",
              lambda f: _off(f, 2.0), most=1e-9),
        Claim("Two tokens, w = 4: the same, less −√15/4", f"{PAPER}, figure 1", lambda f: _off(f, 4.0), most=1e-9),
        Claim("Share of starts that stay apart at w = 2; the arcs between the fixed points give 5/12", "derived here",
              lambda f: _share(f, 2.0), least=0.41, most=0.425),
        Claim("Share of starts that stay apart without the norm", f"{PAPER}, theorem 1", lambda f: _share(f, 2.0, norm=False), most=0),
        Claim("Equilibria of every rank: largest change in one layer", f"{PAPER}, theorem 3",
              lambda f: f["equilibria"]["residual"].max(), most=1e-12),
        Claim("Equilibria of every rank: how many have another rank than they were built for", f"{PAPER}, theorem 3", _wrong_ranks, most=0),
        Claim("Most equilibria of rank 2 or more are not stable: share whose layer grows a change", "measured here",
              lambda f: (f["equilibria"].query("rank > 1")["growth"] > 1 + 1e-9).mean(), least=0.5),
        Claim("A sink at e_d keeps random tokens apart: share of starts of 16 tokens of width 8 that end with rank 2 or more",
              "measured here", lambda f: (_ranks(f, 16, 2.0) > 1).mean(), least=0.9),
        Claim("A sink at e_d with w = 8 keeps full rank: lowest rank at the end of 64 tokens of width 16", "measured here",
              lambda f: _ranks(f, 64, 8.0).min(), least=16),
        Claim("Orthogonal values, complete mask: tokens become equal in spite of the norm", f"{PAPER}, theorem 2",
              lambda f: _last(f, "complete"), most=1e-13),
        Claim("Orthogonal values, causal mask: tokens become equal in spite of the norm", f"{PAPER}, theorem 2",
              lambda f: _last(f, "causal"), most=1e-13),
        Claim("Orthogonal values, each token sees its neighbours: they have not become equal after as many layers",
              f"{PAPER}, theorem 1", lambda f: _last(f, "neighbours"), least=0.01),
    )  # fmt: skip
    sizes = EquilibriaSizes(seeds=5)
    quick = EquilibriaSizes(seeds=2)

    def measure(self, run: SeedRun[EquilibriaSizes]) -> dict[str, list[Row]]:
        generator = torch.Generator().manual_seed(run.seed)
        run.trainer.report("layers", 0, 1)
        return {
            "two_tokens": list(two_tokens(run.sizes, generator)),
            "equilibria": list(of_every_rank(run.sizes)),
            "sinks": list(sinks(run.sizes, generator)),
            "orthogonal": list(orthogonal(run.sizes, generator)),
        }


EXPERIMENT = Equilibria()
