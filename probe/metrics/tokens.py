"""One stream, and what the metrics share of it."""

from functools import cached_property

import torch
from torch import Tensor

from rc_probe.hooks.errors import RcProbeError
from rc_probe.registry import MASSIVE

from .best_residual import argmin_residual
from .norms import composite_norm

NOISE = 4.0  # rounding noise of a stream, in eps of its dtype, relative to its size

Reading = tuple[Tensor, Tensor]  # values (B,) and rounding floors (B,), float64


class Tokens:
    """One stream and what the metrics share of it; each quantity is computed once, when first asked for."""

    def __init__(self, x: Tensor, mask: Tensor | None = None, noise: float = 0.0) -> None:
        if x.ndim != 3 or not x.is_floating_point():
            what = f"a stream must be floating of shape (batch, tokens, dim), not {x.dtype} {tuple(x.shape)}"
            raise RcProbeError(what, where="metrics")
        if mask is not None and mask.shape != x.shape[:2]:
            what = f"a mask of shape {tuple(mask.shape)} does not fit a stream of shape {tuple(x.shape)}"
            raise RcProbeError(what, where="metrics")
        self.noise = max(NOISE * _eps(x), noise)
        real = None if mask is None else mask.bool()
        x = x.detach()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        self._hold(x if real is None else x.masked_fill(~real[..., None], 0), real)

    def _hold(self, x: Tensor, real: Tensor | None) -> None:
        """x: (B, T, D), zero where not `real` (B, T), None: all are."""
        self.x, self.real = x, real
        self._keep = None if real is None else real[..., None].to(x.dtype)  # (B, T, 1)
        if real is None:
            self.count = torch.full(x.shape[:1], x.shape[1], dtype=torch.float64, device=x.device)
        else:
            self.count = real.sum(1).double()  # (B,) real tokens

    @cached_property
    def massive(self) -> Tensor:
        """(B, T) bool: tokens of norm over MASSIVE times the median of their sample; none where that is 0.

        None either in a sample that is not finite: what is wrong with it must not be left out.
        """
        return self.longer(MASSIVE)

    @cached_property
    def median(self) -> Tensor:
        """The median norm (B,) of the real tokens, the mean of the two middle ones."""
        norms = self.lengths if self.real is None else self.lengths.masked_fill(~self.real, torch.inf)
        ordered = norms.sort(1).values
        count = self.count.long()
        ends = torch.stack([((count - 1) // 2).clamp_min(0), (count // 2).clamp_max(norms.shape[1] - 1)], 1)
        return ordered.gather(1, ends).mean(1)

    def longer(self, factor: float) -> Tensor:
        """(B, T) bool: tokens whose norm is over `factor` times the median."""
        over = (self.lengths > factor * self.median[:, None]) & (self.median > 0)[:, None]
        return over & self.lengths.isfinite().all(1, keepdim=True)

    @cached_property
    def bulk(self) -> "Tokens":
        """The stream without its massive tokens."""
        return self.without(self.massive)

    def without(self, left_out: Tensor) -> "Tokens":
        """The stream without some of its tokens (B, T); itself where the CPU sees that there are none."""
        if left_out.device.type == "cpu" and not bool(left_out.any()):
            return self
        rest = Tokens.__new__(Tokens)
        rest.noise = self.noise
        real = ~left_out if self.real is None else self.real & ~left_out
        rest._hold(self.x * real[..., None].to(self.x.dtype), real)
        return rest

    @cached_property
    def centred(self) -> Tensor:
        """res(X) = X - 1 mean(X)ᵀ (B, T, D), padding 0.

        The mean is subtracted twice. The first mean is rounded, and that error, the same in all rows, would
        alone show as a residual of 1.6e-7 in float32; the second mean is that error, and takes it away.
        """
        residual = self._clear(self.x - self._mean(self.x))
        return self._clear(residual.sub_(self._mean(residual)))

    @cached_property
    def size(self) -> Tensor:
        """‖X‖₁,∞ (B,)."""
        return composite_norm(self.x)

    @cached_property
    def centred_size(self) -> Tensor:
        """‖res X‖₁,∞ (B,)."""
        return composite_norm(self.centred)

    @cached_property
    def lengths(self) -> Tensor:
        """‖x_i‖₂ (B, T), float64, in which squares of float32 neither overflow nor vanish; padding 0."""
        lengths: Tensor = torch.linalg.vector_norm(self.x, dim=2, dtype=torch.float64)
        return lengths

    @cached_property
    def centred_lengths(self) -> Tensor:
        """‖x_i - mean‖₂ (B, T), float64, padding 0."""
        lengths: Tensor = torch.linalg.vector_norm(self.centred, dim=2, dtype=torch.float64)
        return lengths

    @cached_property
    def moved(self) -> Tensor:
        """How far the noise moves each token (B, T)."""
        return self.noise * self.lengths

    @cached_property
    def centred_moved(self) -> Tensor:
        """How far it moves x_i - mean (B, T): the mean moves too, with a massive token more than others do."""
        return self.moved + (self.moved.sum(1) / self.count)[:, None]

    @cached_property
    def cosine(self) -> Reading:
        """Mean cosine over pairs of different tokens (B,), and its floor."""
        return self.mean_cosine(self.x, self.lengths, self.moved)

    @cached_property
    def singular_values(self) -> Tensor:
        """Singular values of X (B, min(T, D)), in float64; NaN for a sample that is not finite."""
        x = self.x.double()
        finite = x.isfinite().all(2).all(1)[:, None]  # (B, 1)
        x = x.where(finite[..., None], 0.0)
        tall = x.mT if x.shape[2] > x.shape[1] else x  # LAPACK is much faster on tall matrices
        values: Tensor = torch.linalg.svdvals(tall)
        return values.where(finite, torch.nan)

    @cached_property
    def best(self) -> tuple[Tensor, Tensor]:
        """Upper and lower bound (B,) of min over x of ‖X - 1 xᵀ‖₁,∞."""
        samples = list(self.x) if self.real is None else [
            x[real] for x, real in zip(self.x, self.real, strict=True)
        ]  # fmt: skip
        bounds = [argmin_residual(x)[:2] if len(x) else (torch.nan, torch.nan) for x in samples]
        upper, lower = self.count.new_tensor(bounds).reshape(-1, 2).unbind(1)
        return upper, lower

    def constant(self, value: float) -> Tensor:
        """(B,) of one value."""
        return torch.full_like(self.count, value)

    def mean_cosine(self, vectors: Tensor, lengths: Tensor, noise: Tensor) -> Reading:
        """Mean cosine over pairs of different real tokens (B,), in O(T D).

        The squared length of the sum of the unit vectors is the sum of all cosines, the diagonal included.
        vectors: (B, T, D) and their lengths (B, T), padding 0; noise (B, T): how far rounding moves a vector.
        That turns it by at most noise / length (at most 1 is counted), and a cosine moves by no more than its
        two angles: the floor.
        """
        absent = lengths == 0
        units = vectors / lengths.masked_fill(absent, 1)[..., None].to(vectors.dtype)
        total = units.sum(1).double().square().sum(1)  # (B,)
        cosine = (total - (~absent).sum(1)) / (self.count * (self.count - 1))
        turn = (noise / lengths).clamp(max=1).masked_fill(absent, 1)[..., None]
        floor = 2 * (turn if self.real is None else turn * self.real[..., None]).sum(dim=(1, 2)) / self.count
        return cosine.clamp(-1, 1).where(self.count != 1, torch.nan), floor

    def mean_absolute_cosine(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """Mean |cosine| over pairs of different real tokens (B,), NaN where there is no pair; sample by sample, T² numbers each."""
        units = vectors / lengths.masked_fill(lengths == 0, 1)[..., None].to(vectors.dtype)
        with torch.autocast(units.device.type, enabled=False):
            every = torch.stack([(u @ u.T).abs().sum(dtype=torch.float64) for u in units])
        pairs = self.count * (self.count - 1)
        return ((every - (lengths > 0).sum(1)) / pairs).clamp(0, 1).where(self.count != 1, torch.nan)

    def _clear(self, y: Tensor) -> Tensor:
        """Zero the padding of y (B, T, n), in place. By a product, many times faster than a broadcast fill."""
        return y if self._keep is None else y.mul_(self._keep)

    def _mean(self, y: Tensor) -> Tensor:
        return y.sum(1, keepdim=True) / self.count.to(y.dtype)[:, None, None]  # (B, 1, D)


def _eps(x: Tensor) -> float:
    """Of the coarsest dtype that a stream was computed in, as far as is known here."""
    eps = torch.finfo(x.dtype).eps
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(x.device.type)).eps)
    return eps


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; 0 where whole is 0, since so is the part."""
    return part / whole.masked_fill(whole == 0, 1)
