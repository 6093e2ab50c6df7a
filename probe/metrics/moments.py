"""Count, mean and variance of a stream of numbers, kept on its device and merged without loss."""

from collections.abc import Hashable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)  # such as (layer, metric)
Packed = tuple[list[Key], Tensor]  # and (n, 3, …): count, mean, m2; on the host


class Moments:
    """Running count, mean and sum of squared deviations (m2), float64, on one device, updated in place.

    No number is kept, nothing is copied to the host. Updates and merges are those of Chan, Golub and LeVeque
    (1983, "Algorithms for computing the sample variance"): no difference of large sums, so the result does
    not depend on how the samples were cut into batches, up to the last bits. NaN and infinite values show
    in the mean.
    """

    def __init__(self, device: torch.device | str | None = None, kept: Tensor | None = None) -> None:
        """kept: (3, …), count, mean and m2 so far; None: of nothing yet, on `device`."""
        self._keep(torch.zeros(3, dtype=torch.float64, device=device) if kept is None else kept)

    def _keep(self, kept: Tensor) -> None:
        self._kept = kept
        self.count, self.mean, self.m2 = kept.unbind()

    def add(self, values: Tensor, counted: Tensor | None = None) -> None:
        """Take in values (B,), one per sample; further dimensions (B, ...) are kept apart. B may be 0.

        counted: (B,) bool, the samples that count; None: all
        """
        if len(values) == 0:
            return
        values = values.detach().to(self.mean)
        if counted is None:
            mean = values.mean(0)
            self._join(len(values), mean, (values - mean).square().sum(0))
            return
        here = counted.to(values.device).view(-1, *[1] * (values.ndim - 1))
        count = here.sum(dtype=torch.float64).expand_as(self.count)
        mean = values.where(here, 0).sum(0) / count.clamp_min(1)
        self._join(count, mean, (values - mean).where(here, 0).square().sum(0))

    def merge(self, other: "Moments") -> None:
        """Take in all that `other` has seen; `other` may be empty, or on another device."""
        self._join(other.count.to(self.mean), other.mean.to(self.mean), other.m2.to(self.mean))

    def _join(self, count: Tensor | int, mean: Tensor, m2: Tensor) -> None:
        total = self.count + count
        share = count / total.clamp_min(1)  # 0 when both are empty
        delta = mean - self.mean
        m2 = torch.addcmul(self.m2 + m2, delta.square(), self.count * share)
        joined = [total.expand_as(m2), torch.addcmul(self.mean, delta, share), m2]
        if m2.shape == self.m2.shape:
            torch.stack(joined, out=self._kept)
        else:
            self._keep(torch.stack(joined))

    def part(self, index: int | slice) -> "Moments":
        """Those of some of the numbers that were kept apart, as they are now."""
        return Moments(kept=self._kept[:, index].clone())

    @property
    def std(self) -> Tensor:
        """Sample standard deviation (ddof 1); NaN when fewer than two samples were seen."""
        return (self.m2 / (self.count - 1)).sqrt().where(self.count > 1, torch.nan)


def pack(moments: dict[Key, Moments]) -> Packed[Key]:
    """What `moments` have seen, to be sent to another process: one copy from each device."""
    rows: dict[Key, Tensor] = {}
    for device in {m.count.device for m in moments.values()}:
        here = {key: m._kept for key, m in moments.items() if m.count.device == device}
        rows |= dict(zip(here, torch.stack(list(here.values())).cpu(), strict=True))
    return list(rows), torch.stack(list(rows.values())) if rows else torch.zeros(0, 3, dtype=torch.float64)


def unpack(packs: Iterable[Packed[Key]]) -> dict[Key, Moments]:
    """The Moments of all that was packed, merged in the order of `packs`, on the host."""
    found: dict[Key, Moments] = {}
    for keys, rows in packs:
        for key, row in zip(keys, rows, strict=True):
            found.setdefault(key, Moments())._join(*row)
    return found
