"""Attention layers in plain arithmetic of several hundred digits: what split arithmetic must agree with."""

from __future__ import annotations

import mpmath
from torch import Tensor

Matrix = list[list[mpmath.mpf]]


def exact(x: Tensor) -> Matrix:
    """A matrix (n, m) of floats, exactly."""
    return [[mpmath.mpf(v) for v in row] for row in x.double().tolist()]


def product(a: Matrix, b: Matrix) -> Matrix:
    columns = list(zip(*b, strict=True))
    return [[mpmath.fsum(x * y for x, y in zip(row, c, strict=True)) for c in columns] for row in a]


def affine(x: Matrix, weight: Tensor, bias: Tensor) -> Matrix:
    """x W^T + b, as nn.Linear."""
    b = [mpmath.mpf(v) for v in bias.tolist()]
    return [[v + c for v, c in zip(row, b, strict=True)] for row in product(x, exact(weight.T))]


def softmax(row: list[mpmath.mpf]) -> list[mpmath.mpf]:
    powers = [mpmath.exp(v) for v in row]
    return [p / mpmath.fsum(powers) for p in powers]


def attention(q: Matrix, k: Matrix, v: Matrix, heads: int) -> Matrix:
    d = len(q[0]) // heads
    out: Matrix = [[] for _ in q]
    for h in range(heads):
        qh, kh, vh = ([row[h * d : (h + 1) * d] for row in m] for m in (q, k, v))
        scores = product(qh, [list(column) for column in zip(*kh, strict=True)])
        pattern = [softmax([s / mpmath.sqrt(d) for s in row]) for row in scores]
        for row, more in zip(out, product(pattern, vh), strict=True):
            row.extend(more)
    return out


def layer_norm(x: Matrix, weight: Tensor, bias: Tensor, eps: float) -> Matrix:
    out = []
    for row in x:
        mean = mpmath.fsum(row) / len(row)
        scale = mpmath.sqrt(mpmath.fsum((v - mean) ** 2 for v in row) / len(row) + mpmath.mpf(eps))
        out.append(
            [(v - mean) / scale * g + b for v, g, b in zip(row, weight.tolist(), bias.tolist(), strict=True)]
        )
    return out


def residual(x: Matrix) -> Matrix:
    means = [mpmath.fsum(column) / len(x) for column in zip(*x, strict=True)]
    return [[v - m for v, m in zip(row, means, strict=True)] for row in x]


def composite(x: Matrix) -> mpmath.mpf:
    rows = max(mpmath.fsum(abs(v) for v in row) for row in x)
    columns = max(mpmath.fsum(abs(v) for v in column) for column in zip(*x, strict=True))
    return mpmath.sqrt(rows) * mpmath.sqrt(columns)
