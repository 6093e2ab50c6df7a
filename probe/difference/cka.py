"""Linear CKA of two streams, by sums over tokens: memory is that of three matrices of width × width."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rc_probe.processes.world import World

BYTES = 2**32  # that the sums of all layers may take


@dataclass
class Sums:
    """Of rows (x, y): how many, their means, and the sums of products of what is left, centred; float64.

    Batches are joined as by Chan, Golub and LeVeque (1983): no difference of large sums.
    """

    count: int
    x: Tensor  # (Dx,)
    y: Tensor  # (Dy,)
    xx: Tensor  # (Dx, Dx)
    yy: Tensor  # (Dy, Dy)
    yx: Tensor  # (Dy, Dx)

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Sums:
        """Of rows x (n, Dx) and y (n, Dy), float64; n may be 0."""
        a, b = (rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[1]) for rows in (x, y))
        x, y = x - a, y - b
        return cls(len(x), a, b, x.T @ x, y.T @ y, y.T @ x)

    def joined(self, other: Sums) -> Sums:
        """Of the rows of both."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        x, y, weight = other.x - self.x, other.y - self.y, self.count * other.count / count
        share = other.count / count
        return Sums(
            count, self.x + share * x, self.y + share * y, self.xx + other.xx + weight * torch.outer(x, x),
            self.yy + other.yy + weight * torch.outer(y, y), self.yx + other.yx + weight * torch.outer(y, x),
        )  # fmt: skip

    def summed(self, world: World) -> Sums:
        """Of the rows of all processes: each moves its sums to the mean of all, then they add up."""
        count = int(world.sum(torch.tensor(self.count)))
        if world.size == 1 or not count:
            return self
        a, b = (world.sum(self.count * mean) / count for mean in (self.x, self.y))
        x, y, n = self.x - a, self.y - b, self.count
        moved = (
            self.xx + n * torch.outer(x, x),
            self.yy + n * torch.outer(y, y),
            self.yx + n * torch.outer(y, x),
        )
        return Sums(count, a, b, *map(world.sum, moved))

    @property
    def cka(self) -> float:
        """‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), 0 to 1; NaN where the rows of x or of y are all equal."""
        xx, yy, yx = (float(m.square().sum()) for m in (self.xx, self.yy, self.yx))
        size = math.sqrt(xx * yy)  # exactly xx where they are equal
        return min(yx / size, 1.0) if size else math.nan


class Cka:
    """CKA of all tokens of a layer, and of its bulk: the tokens that are massive in neither model."""

    def __init__(self) -> None:
        self._bulk: Sums | None = None
        self._massive: Sums | None = None  # few models have any

    def add(self, x: Tensor, y: Tensor, massive: Tensor) -> None:
        """The tokens x (n, Dx), y (n, Dy), and which are massive (n,) bool."""
        x, y = x.double(), y.double()
        rest = Sums.of(x[~massive], y[~massive])
        self._bulk = rest if self._bulk is None else self._bulk.joined(rest)
        if bool(massive.any()):
            few = Sums.of(x[massive], y[massive])
            self._massive = few if self._massive is None else self._massive.joined(few)

    def together(self, world: World, dim_x: int, dim_y: int) -> Cka:
        """Of the tokens of all processes, some of which may have had none."""
        whole, none = Cka(), Sums.of(torch.zeros(0, dim_x).double(), torch.zeros(0, dim_y).double())
        whole._bulk = (self._bulk or none).summed(world)
        if any(world.gather(self._massive is not None, "massive tokens")):
            whole._massive = (self._massive or none).summed(world)
        return whole

    def values(self) -> dict[str, float]:
        bulk = self._bulk
        if bulk is None:
            return {}
        whole = bulk if self._massive is None else bulk.joined(self._massive)
        return {"cka": whole.cka, "cka_bulk": bulk.cka}


def affordable(layers: int, dim_a: int, dim_b: int) -> list[int]:
    """The layers, from 0, whose CKA is measured: all, or as many evenly spaced ones as fit into BYTES; none below two."""
    each = 2 * 8 * (dim_a**2 + dim_b**2 + dim_a * dim_b)  # bulk and massive
    count = min(layers, BYTES // each)
    if count < 2:
        return []
    return [round(i * (layers - 1) / (count - 1)) for i in range(count)]
