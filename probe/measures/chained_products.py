"""Products of attention patterns held as their mean row and what differs from it, and paths drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rc_probe.hooks.one_thread import small_matrices
from rc_probe.metrics.norms import composite_norm
from rc_probe.metrics.pattern_metrics import furthest_rows

SQUARINGS = 8


def draw_paths(heads: Sequence[int], draws: int, generator: torch.Generator) -> Tensor:
    """`draws` random paths of each length 1 … L, (L draws, L), shortest first; L = len(heads) layers.

    An entry is a head, from 1, or 0 for the skip. Layers are drawn without replacement, heads with.
    """
    L = len(heads)
    length = torch.arange(1, L + 1).repeat_interleave(draws)
    order = torch.rand(len(length), L, generator=generator).argsort(1)
    head = torch.rand(len(length), L, generator=generator, dtype=torch.float64) * torch.tensor(heads)
    return (head.long() + 1).where(order < length[:, None], 0)


def identity(T: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The empty product of T tokens: its mean row (T,) and the deviation (T, T) of its rows from it."""
    mean = torch.full((T,), 1 / T, dtype=torch.float64, device=device)
    return mean, torch.eye(T, dtype=torch.float64, device=device) - mean


def single(pattern: Tensor) -> tuple[Tensor, Tensor]:
    """The product of one pattern (T, T): what `multiplied` makes of it and the identity, without a product of matrices."""
    moved = pattern - pattern.mean(1, keepdim=True)  # as rows that sum to one exactly
    shift = moved.mean(0)
    return 1 / len(shift) + shift, moved.sub_(shift)


def multiplied(pattern: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """pattern (T, T), whose rows sum to one, times a product (from the left)."""
    moved = pattern @ deviation
    shift = moved.mean(0)
    return mean + shift, moved.sub_(shift)


def distances(mean: Tensor, deviation: Tensor, *, spread: bool = True) -> dict[str, Tensor]:
    """The CHAIN_METRICS of products P = 1 mean^T + deviation, (n,) each; without `spread` all but the last.

    mean (n, T), deviation (n, T, T), the mean of whose rows is zero
    """
    product = mean[:, None] + deviation
    size = composite_norm(product)
    mean_row = composite_norm(deviation) / size
    found = {
        "rank_one": composite_norm(_beyond_rank_one(product, mean, deviation, mean_row)) / size,
        "mean_row": mean_row,
    }
    if spread:
        found["dobrushin"] = furthest_rows(deviation).clamp(max=1)
    return found


def _beyond_rank_one(product: Tensor, mean: Tensor, deviation: Tensor, mean_row: Tensor) -> Tensor:
    """P - s u v^T, with the first singular vectors u, v: (1 - u u^T) P (1 - v v^T), without cancellation."""
    v = first_eigenvector(product.mT @ product)  # (n, T, 1)
    u = product @ v
    u = u / torch.linalg.vector_norm(u, dim=1, keepdim=True)
    rest = deviation - u @ (u.mT @ deviation)
    rest = rest - (rest @ v) @ v.mT
    left, right = 1 - u * u.sum(1, keepdim=True), mean[..., None] - v * (v.mT @ mean[..., None])
    # Of third order in D, since 1^T D = 0: from 1e-8 down it is below the last bit, and what is computed is rounding.
    beyond: Tensor = rest + (left @ right.mT) * (mean_row > 1e-8)[:, None, None]
    return beyond


def first_eigenvector(square: Tensor) -> Tensor:
    """The eigenvector (n, T, 1) of the largest eigenvalue of symmetric matrices (n, T, T), none negative.

    A power of a matrix is of rank one as soon as the first eigenvalue has outgrown the second, which for products of
    patterns is soon. Where SQUARINGS are not enough the matrix is taken apart, at many times the work.
    """
    power, found = square, torch.empty_like(square[..., :1])
    left = torch.arange(len(square), device=square.device)
    for _ in range(SQUARINGS):
        power = power / power.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        power = power @ power  # of trace 1 where it is of rank one
        trace = power.diagonal(dim1=1, dim2=2).sum(1)
        done = trace > 1 - 1e-12
        column = power.diagonal(dim1=1, dim2=2).argmax(1)[:, None, None].expand(-1, power.shape[1], 1)
        found[left[done]] = power.gather(2, column)[done]
        power, left = power[~done], left[~done]
    if len(left):
        with small_matrices(square):
            found[left] = torch.linalg.eigh(square[left]).eigenvectors[..., -1:]
    unit: Tensor = found / torch.linalg.vector_norm(found, dim=1, keepdim=True)
    return unit
