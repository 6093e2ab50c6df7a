"""The residual at its best x: min over x of ‖X - 1 xᵀ‖₁,∞, between an attained value and a certified bound.

The composite norm of X - 1 xᵀ is sqrt(a(x) b(x)), with a the largest column and b the largest row of absolute
sums. Both are convex in x; their product is not, but every straight line under the curve of attainable (a, b)
is one convex problem,

    min over x of  w a(x) + (1 - w) b(x),   0 <= w <= 1,

and a few such lines fence the curve in. From above: the best sqrt(a b) of any x that was tried. From below:
the smallest product a b on the corner points of the fence (along a line the product is concave, so it is
smallest at an end).

Each line is certified by duality. A maximum is the best weighted mean, so for any p >= 0 on the columns
that sum to w and any q >= 0 on the rows that sum to 1 - w,

    w a(x) + (1 - w) b(x)  >=  sum_ij (p_j + q_i) |X_ij - x_j|,

whose minimum over x is exact: in each column the weighted median. p and q come for free from the primal
solver.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Weights of the lines. w = 1 is exact without a solver: the column medians minimise every column sum at once.
_WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8)
_LEARNING_RATE = 0.2  # in mean absolute deviations of a column
_SMOOTHING = (0.05, 0.0005)  # temperature of the soft maxima, first and last; a and b are 1 at the median


class Argmin(NamedTuple):
    """lower <= min over x of ‖X - 1 xᵀ‖₁,∞ <= upper, and upper is attained at x (D,)."""

    upper: float
    lower: float
    x: Tensor


def argmin_residual(tokens: Tensor, steps: int = 400) -> Argmin:
    """Minimise ‖X - 1 xᵀ‖₁,∞ over x for one matrix X (T, D) of real tokens (no padding).

    Returns bounds in the unit of X. On streams of BERT-like models they are within 0.1 % of each other,
    about a second for 128 x 768; `steps` trades time for that gap, the bounds hold for any number of steps.
    upper never exceeds ‖X‖₁,∞ nor the value at the token mean. Non-finite input gives NaN bounds.
    Source: Dong et al. 2021, section 2 (the definition); the method is described at the head of this file.
    """
    X = tokens.detach().double()
    median = X.median(0).values
    columns, rows = _sums(X - median)
    a0, b0 = columns.amax(), rows.amax()  # units of a and b; a0 is the least possible a
    if not torch.isfinite(a0 * b0):
        return Argmin(torch.nan, torch.nan, X.mean(0))
    if a0 == 0:
        return Argmin(0.0, 0.0, median)

    trial, floors = _fence(X, median, a0, b0, steps)
    candidates = torch.stack([torch.zeros_like(median), X.mean(0), median, *trial])  # (C, D)
    columns, rows = _sums(X - candidates[:, None])
    values = columns.amax(-1).sqrt() * rows.amax(-1).sqrt()
    best = int(values.argmin())
    lines = [(1.0, 0.0, 1.0), *((w, 1 - w, floor) for w, floor in zip(_WEIGHTS, floors, strict=True))]
    lower = _least_product(lines) ** 0.5 * float(a0.sqrt() * b0.sqrt()) * (1 - 1e-12)  # its own rounding
    return Argmin(float(values[best]), min(lower, float(values[best])), candidates[best])


def _sums(residual: Tensor) -> tuple[Tensor, Tensor]:
    """(..., T, D) -> absolute sums of the columns (..., D) and of the rows (..., T)."""
    size = residual.abs()
    return size.sum(-2), size.sum(-1)


def _fence(X: Tensor, median: Tensor, a0: Tensor, b0: Tensor, steps: int) -> tuple[Tensor, list[float]]:
    """Solve all lines side by side: the best x found for each (K, D), and each line's certified floor.

    Adam on soft maxima whose temperature falls; a and b are in units of a0 and b0.
    """
    ordered, order = X.sort(0)  # for the weighted medians
    scale = (X - median).abs().mean(0).clamp_min(torch.finfo(X.dtype).tiny)  # (D,)
    w = X.new_tensor(_WEIGHTS)[:, None]  # (K, 1)
    # Start at the median or the mid-range: one huge token draws the best x of some lines far from the median.
    starts = torch.stack([median, (ordered[0] + ordered[-1]) / 2])  # (2, D)
    columns, rows = _sums(X - starts[:, None])
    x = starts[(w * columns.amax(1) / a0 + (1 - w) * rows.amax(1) / b0).argmin(1)]  # (K, D)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    best, best_x, floors = torch.full_like(w[:, 0], torch.inf), x, torch.zeros_like(w[:, 0])
    for step in range(steps):
        left = 1 - step / steps
        temperature = _SMOOTHING[1] * (_SMOOTHING[0] / _SMOOTHING[1]) ** left
        R = X - x[:, None]  # (K, T, D)
        columns, rows = _sums(R)
        columns, rows = columns / a0, rows / b0
        product = columns.amax(1) * rows.amax(1)
        best, best_x = torch.minimum(best, product), torch.where((product < best)[:, None], x, best_x)
        p = w * torch.softmax(columns / temperature, 1) / a0  # (K, D)
        q = (1 - w) * torch.softmax(rows / temperature, 1) / b0  # (K, T)
        if step % 20 == 19 or step == steps - 1:
            floors = torch.maximum(floors, _dual(ordered, order, p, q))
        sign = R.sign_()
        gradient = -(p * sign.sum(1) + (q[:, None] @ sign)[:, 0]) * scale
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient.square()
        move = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.99 ** (step + 1))).sqrt() + 1e-12)
        x = x - _LEARNING_RATE * (left + 0.01) * scale * move
    return best_x, floors.tolist()


def _dual(ordered: Tensor, order: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """min over x of sum_ij (p_j + q_i) |X_ij - x_j| (K,), exact: the weighted median of each column.

    ordered, order: X sorted by column, and the rows that its entries came from (T, D).
    """
    weight = q[:, order] + p[:, None]  # (K, T, D)
    below = weight.cumsum(1)
    middle = (2 * below < below[:, -1:]).sum(1, keepdim=True)  # (K, 1, D)
    x = ordered.expand(len(p), -1, -1).gather(1, middle)
    return (weight * (ordered - x).abs()).sum((1, 2))


def _least_product(lines: list[tuple[float, float, float]]) -> float:
    """Least a b over the points with u a + v b >= c for all lines (u, v, c): at a corner of that region."""
    corners = []
    for i, (u, v, c) in enumerate(lines):
        for s, t, d in lines[:i]:
            det = u * t - v * s
            a, b = (c * t - v * d) / det, (u * d - c * s) / det
            if all(g * a + h * b >= e * (1 - 1e-12) for g, h, e in lines):
                corners.append(a * b)
    return max(0.0, min(corners))
