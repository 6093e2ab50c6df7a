"""What is known of the heads of one attention op: the modules that make queries, keys and values, and small factors of their maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rc_probe.hooks.structure.structure import AttentionOp, Block


@dataclass(frozen=True)
class Projection:
    """A module of a block and the features of its output (of the output projection: its input) that each head has.

    name: in the model; turn: its call within the block's, from 0
    features: (heads, width) int64, from 0
    scale: (heads, width) what each is taken times on its way into the attention op
    """

    name: str
    turn: int
    features: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Circuit:
    """The form M = AᵀB of each head, float64, with A and B (heads, width, dim) never multiplied out.

    a, b: (heads, width, width), triangular: A = aᵀQ with Q of orthonormal rows, so that aᵀa = AAᵀ. Biases are a last column
    of A and B
    across: ABᵀ (heads, width, width) without these columns, and norms: ‖AᵀB‖ of the same
    dim: of the square matrix without the biases
    """

    a: Tensor
    b: Tensor
    across: Tensor
    norms: Tensor
    dim: int

    @classmethod
    def of(cls, a: Tensor, b: Tensor, dim: int) -> Circuit:
        """a, b: (heads, width, dim or dim + 1) float64; columns behind `dim` are biases."""
        plain = a[..., :dim], b[..., :dim]
        grams = [x @ x.mT for x in plain]
        norms = (grams[0] * grams[1]).sum((-2, -1)).clamp_min(0).sqrt()
        return cls(factor(a), factor(b), plain[0] @ plain[1].mT, norms, dim)

    @property
    def core(self) -> Tensor:
        """a bᵀ (heads, width, width): its singular values are those of M that are not 0."""
        return self.a @ self.b.mT


def factor(x: Tensor) -> Tensor:
    """The triangular r (…, width, width) of x (…, width, dim) = rᵀ Q, Q with orthonormal rows."""
    short = x.shape[-2] - x.shape[-1]
    if short > 0:  # heads wider than the stream
        x = torch.nn.functional.pad(x, (0, short))
    r: Tensor = torch.linalg.qr(x.mT, mode="r").R
    return r


@dataclass(frozen=True)
class Rotary:
    """Rotary positions. pairs: (n, 2) features of a head that turn together, and angles: (n,) of one step, fastest first."""

    pairs: Tensor
    angles: Tensor


@dataclass(frozen=True)
class Heads:
    """The heads of one attention op, read off a model and proved on its example.

    query, key, value: of the projections; out: of the output projection, None where it cannot be read
    groups: query heads that share one key and value
    rotary: None where queries and keys do not turn with their positions; turns: whether they do
    qk: from what enters the projections, behind the norm before them, to scores at equal positions; ov: the same to
    what is added to the stream. Gains of the norm are in both
    energy: (heads, pairs) of the form of each pair of rotary features
    no_ov: why there is no `ov`; left_out: what is no part of the forms
    """

    block: Block
    op: AttentionOp
    query: Projection
    key: Projection
    groups: int
    turns: bool
    rotary: Rotary | None
    qk: Circuit
    ov: Circuit | None
    energy: Tensor | None
    no_ov: str
    left_out: tuple[str, ...]

    @property
    def width(self) -> int:
        """Of a head's queries and keys."""
        return self.query.features.shape[1]

    @property
    def count(self) -> int:
        """Of query heads."""
        return self.query.features.shape[0]
