"""Points with a nearest or a farthest one, and the networks that are to find it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

NEAREST, FARTHEST = "nearest", "farthest"


# ---- data


class Points(NamedTuple):
    """queries (B, M, d), points (B, N, d), answers (B, M, d): a row of points for each query."""

    queries: Tensor
    points: Tensor
    answers: Tensor


def draw(task: Task, count: int, generator: torch.Generator) -> Points:
    """`count` sets of points with their queries and the right answers."""
    points = _points(task, count, generator)
    if task.target == NEAREST:
        queries = normalize(torch.randn(count, 1, task.dim, generator=generator), dim=-1)
        return Points(queries, points, _chosen(points, (queries @ points.mT).argmax(-1)))
    return Points(points, points, _chosen(points, (points @ points.mT).argmin(-1)))


def _chosen(points: Tensor, which: Tensor) -> Tensor:
    return points.gather(1, which[..., None].expand(*which.shape, points.shape[-1]))


def _points(task: Task, count: int, generator: torch.Generator) -> Tensor:
    free = task.count // 2 if task.points == "doubled" else task.count
    drawn = normalize(torch.randn(count, free, task.dim, generator=generator), dim=-1)
    if task.points == "doubled":
        return torch.cat([drawn, -drawn], 1)
    if task.points == "orthogonal":  # Gram-Schmidt: a batched QR is far slower
        for i in range(1, free):
            before, own = drawn[:, :i], drawn[:, i]
            rest = own - ((before @ own[..., None]) * before).sum(1)
            drawn[:, i] = normalize(rest, dim=-1)
    return drawn


# ---- models


@dataclass(frozen=True)
class Task:
    """One training: what is asked, and of which network. Columns of the table `errors`."""

    rank: int
    heads: int
    target: str = NEAREST
    points: str = "orthogonal"
    dim: int = 16
    count: int = 2
    layers: int = 0
    scratch: int = 0

    @property
    def parameters(self) -> int:
        return 2 * self.rank * (self.dim + self.scratch) * self.heads

    @property
    def law(self) -> float:
        two = (self.target, self.points, self.count, self.layers) == (NEAREST, "orthogonal", 2, 0)
        return plateau(self.dim) if two else math.nan


def plateau(dim: int) -> float:
    """½ (1 − d κ²), κ = Γ(d/2) / (√π Γ((d+1)/2)): the error of the best answer to two orthogonal points that is linear in the query."""
    kappa = math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)
    return 0.5 * (1 - dim * kappa**2)


class Heads(nn.Module):
    """Attention heads of rank r with free values: queries (B, M, d), points (B, N, d) -> (B, M, d)."""

    def __init__(self, dim: int, rank: int, heads: int) -> None:
        super().__init__()
        self.query, self.key = (
            nn.Parameter(torch.randn(heads, rank, dim) / math.sqrt(dim)) for _ in range(2)
        )
        self.value = nn.Parameter(torch.randn(heads, dim, dim) / math.sqrt(dim * heads))

    def scores(self, queries: Tensor, points: Tensor) -> Tensor:
        """(B, H, M, N)"""
        q, k = (torch.einsum("bnd,hrd->bhnr", x, w) for x, w in ((queries, self.query), (points, self.key)))
        return q @ k.mT / math.sqrt(self.query.shape[1])

    def mix(self, scores: Tensor, points: Tensor) -> Tensor:
        return torch.einsum("bhmn,bnd,hde->bme", scores.softmax(-1), points, self.value)

    def forward(self, queries: Tensor, points: Tensor) -> Tensor:
        return self.mix(self.scores(queries, points), points)


class Encoder(nn.Module):
    """Layers of heads and MLPs with skips, each followed by the paper's norm, one number times x / ‖x‖; then a linear map.

    scratch: dimensions in front of which positions are learned
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        dim = task.dim + task.scratch
        self.positions = nn.Parameter(torch.randn(task.count, task.scratch) / math.sqrt(max(task.scratch, 1)))
        self.heads = nn.ModuleList(Heads(dim, task.rank, task.heads) for _ in range(task.layers))
        self.wide = nn.ModuleList(nn.Linear(dim, 4 * dim) for _ in range(task.layers))
        self.narrow = nn.ModuleList(nn.Linear(4 * dim, dim) for _ in range(task.layers))
        self.scales = nn.Parameter(torch.ones(task.layers, 2))
        self.out = nn.Linear(dim, task.dim)

    def forward(self, queries: Tensor, points: Tensor) -> Tensor:
        x = torch.cat([points, self.positions.expand(len(points), -1, -1)], -1)
        for heads, wide, narrow, scale in zip(self.heads, self.wide, self.narrow, self.scales, strict=True):
            x = scale[0] * normalize(x + heads(x, x), dim=-1)
            x = scale[1] * normalize(x + narrow(relu(wide(x))), dim=-1)
        found: Tensor = self.out(x)
        return found


def network(task: Task) -> nn.Module:
    return Encoder(task) if task.layers else Heads(task.dim, task.rank, task.heads)


def squared_error(model: nn.Module, data: Points) -> Tensor:
    """Squared distance to the answers, the mean over queries."""
    found: Tensor = (model(data.queries, data.points) - data.answers).square().sum(-1).mean()
    return found
