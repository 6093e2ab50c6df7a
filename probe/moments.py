"""Count, mean and variance of a stream of numbers, kept on its device and merged without loss."""

import torch
from torch import Tensor


class Moments:
    """Running count, mean and sum of squared deviations (m2), float64, on one device.

    No number is kept, nothing is copied to the host. Updates and merges are those of Chan, Golub and LeVeque
    (1983, "Algorithms for computing the sample variance"): no difference of large sums, so the result does
    not depend on how the samples were cut into batches, up to the last bits. NaN and infinite values show
    in the mean.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros((), dtype=torch.float64, device=device)
        self.m2 = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, values: Tensor) -> None:
        """Take in values (B,), one per sample; further dimensions (B, ...) are kept apart. B may be 0."""
        if len(values) == 0:
            return
        values = values.detach().to(self.mean)
        mean = values.mean(0)
        self._join(self.count.new_tensor(len(values)), mean, (values - mean).square().sum(0))

    def merge(self, other: "Moments") -> None:
        """Take in all that `other` has seen; `other` may be empty, or on another device."""
        self._join(other.count.to(self.mean), other.mean.to(self.mean), other.m2.to(self.mean))

    def _join(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        total = self.count + count
        share = count / total.clamp_min(1)  # 0 when both are empty
        delta = mean - self.mean
        self.m2 = self.m2 + m2 + delta.square() * self.count * share
        self.mean = self.mean + delta * share
        self.count = total

    @property
    def std(self) -> Tensor:
        """Sample standard deviation (ddof 1); NaN when fewer than two samples were seen."""
        return (self.m2 / (self.count - 1)).sqrt().where(self.count > 1, torch.nan)
