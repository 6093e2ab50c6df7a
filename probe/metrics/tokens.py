"""One stream, and what the metrics share of it."""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rc_probe.hooks.errors import RcProbeError
from rc_probe.registry import MASSIVE

from .best_residual import argmin_residual
from .norms import composite
from .pieces import WIDE, divisors, lengths_of, pieces

NOISE = 4.0  # rounding noise of a stream, in eps of its dtype, relative to its size

Reading = tuple[Tensor, Tensor]  # values (B,) and rounding floors (B,), float64


class Sums(NamedTuple):
    """Of X and of res X: their norms ‖·‖₁,∞ (B,) each, and the sums of their rows, each at length 1, (2, B, D).

    centred_lengths: ‖x_i - mean‖₂ (B, T), float64, padding 0
    """

    sizes: tuple[Tensor, ...]
    directions: Tensor
    centred_lengths: Tensor


class Tokens:
    """One stream and what the metrics share of it; each quantity is computed once, when first asked for.

    angles: cosines and `centred_lengths` will be asked for; else there are none
    """

    def __init__(
        self, x: Tensor, mask: Tensor | None = None, noise: float = 0.0, *, angles: bool = True
    ) -> None:
        if x.ndim != 3 or not x.is_floating_point():
            what = f"a stream must be floating of shape (batch, tokens, dim), not {x.dtype} {tuple(x.shape)}"
            raise RcProbeError(what, where="metrics")
        if not x.shape[1]:
            raise RcProbeError(f"a stream of shape {tuple(x.shape)} has no tokens", where="metrics")
        if mask is not None and mask.shape != x.shape[:2]:
            what = f"a mask of shape {tuple(mask.shape)} does not fit a stream of shape {tuple(x.shape)}"
            raise RcProbeError(what, where="metrics")
        self.noise, self.angles = max(NOISE * _eps(x), noise), angles
        real = None if mask is None else mask.bool()
        x = x.detach()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        self._hold(x, real)

    def _hold(self, x: Tensor, real: Tensor | None) -> None:
        """x: (B, T, D), anything where not `real` (B, T), None: all are."""
        self._given, self.real = x, real
        self._pieces = list(pieces(x, real))

    @cached_property
    def count(self) -> Tensor:
        """How many real tokens there are (B,), float64."""
        if self.real is not None:
            return self.real.sum(1, dtype=torch.float64)
        return self.constant(self._given.shape[1])

    @cached_property
    def _room(self) -> Tensor:
        """Room for the largest piece, for two of it where there are angles."""
        return self._given.new_empty(2 if self.angles else 1, self._largest)

    @property
    def _largest(self) -> int:
        return max(piece.x.numel() for piece in self._pieces)

    @cached_property
    def x(self) -> Tensor:
        """X (B, T, D), padding 0."""
        return self._given if self.real is None else self._given.masked_fill(~self.real[..., None], 0)

    @cached_property
    def massive(self) -> Tensor:
        """(B, T) bool: tokens of norm over MASSIVE times the median of their sample; none where that is 0.

        None either in a sample that is not finite: what is wrong with it must not be left out.
        """
        return self.longer(MASSIVE)

    @cached_property
    def median(self) -> Tensor:
        """The median norm (B,) of the real tokens, the mean of the two middle ones."""
        tokens = self.lengths.shape[1]
        if self.real is None:
            upper = self.lengths.topk(tokens // 2 + 1, 1, sorted=False).values
            return upper.topk(2 - tokens % 2, 1, largest=False).values.mean(1)
        ordered = self.lengths.masked_fill(~self.real, torch.inf).sort(1).values
        count = self.count.long()
        ends = torch.stack([((count - 1) // 2).clamp_min(0), (count // 2).clamp_max(tokens - 1)], 1)
        return ordered.gather(1, ends).mean(1)

    def longer(self, factor: float) -> Tensor:
        """(B, T) bool: tokens whose norm is over `factor` times the median."""
        has_any = (self.median > 0) & (self.lengths.amax(1) < torch.inf)  # false of NaN
        return self.lengths > (factor * self.median).where(has_any, torch.inf)[:, None]

    @cached_property
    def bulk(self) -> "Tokens":
        """The stream without its massive tokens."""
        return self.without(self.massive)

    def without(self, left_out: Tensor) -> "Tokens":
        """The stream without some of its tokens (B, T); itself where the CPU sees that there are none."""
        if left_out.device.type == "cpu" and not bool(left_out.any()):
            return self
        rest = Tokens.__new__(Tokens)
        rest.noise, rest.angles = self.noise, self.angles
        rest._hold(self._given, ~left_out if self.real is None else self.real & ~left_out)
        rest.lengths = self.lengths.masked_fill(left_out, 0)
        if rest._largest <= self._room.shape[1]:  # shorter samples may go together in a larger piece
            rest._room = self._room
        return rest

    @cached_property
    def _sums(self) -> Sums:
        """Of X and of res X, in one go through the samples."""
        samples, tokens, dim = self._given.shape
        columns, rows = self._given.new_empty(2, samples, dim), self._given.new_zeros(2, samples, tokens)
        directions = columns.new_empty(columns.shape if self.angles else 0)
        centred_lengths = rows.new_zeros(rows[0].shape if self.angles else 0, dtype=torch.float64)
        for piece in self._pieces:
            rooms = self._room[:, : piece.x.numel()].unflatten(1, piece.x.shape)
            room, many = rooms[0], piece.x.shape[1]
            size = rooms[1] if self.angles else room
            for which in (0, 1):
                y = piece.centred(room) if which else piece.x
                piece.clear(torch.abs(y, out=size))
                torch.sum(size, -2, out=columns[which, piece.samples])
                torch.sum(size, -1, out=rows[which, piece.samples, :many])
                if self.angles:
                    each = lengths_of(y, piece.absent) if which else self.lengths[piece.tokens]
                    torch.div(y, divisors(each, y), out=size)
                    torch.sum(piece.clear(size), -2, out=directions[which, piece.samples])
                    if which:
                        centred_lengths[piece.tokens] = each
        return Sums(composite(columns, rows).unbind(), directions, centred_lengths)

    @property
    def size(self) -> Tensor:
        """‖X‖₁,∞ (B,)."""
        return self._sums.sizes[0]

    @property
    def centred_size(self) -> Tensor:
        """‖res X‖₁,∞ (B,)."""
        return self._sums.sizes[1]

    @cached_property
    def lengths(self) -> Tensor:
        """‖x_i‖₂ (B, T), float64, padding 0."""
        if self._given.shape[-1] <= WIDE:  # no copy is made
            return lengths_of(self._given, None if self.real is None else ~self.real)
        found = self._given.new_zeros(self._given.shape[:2], dtype=torch.float64)
        for piece in self._pieces:
            found[piece.tokens] = lengths_of(piece.x, piece.absent)
        return found

    @property
    def centred_lengths(self) -> Tensor:
        """‖x_i - mean‖₂ (B, T), float64, padding 0."""
        return self._sums.centred_lengths

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
        return self._mean_cosine(self._sums.directions[0], self.lengths, self.moved)

    @property
    def cosine_centred(self) -> Reading:
        """The same after the token mean is subtracted."""
        return self._mean_cosine(self._sums.directions[1], self.centred_lengths, self.centred_moved)

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
        return self._given.new_full(self._given.shape[:1], value, dtype=torch.float64)

    def _mean_cosine(self, directions: Tensor, lengths: Tensor, noise: Tensor) -> Reading:
        """Mean cosine over pairs of different real tokens (B,), in O(T D).

        The squared length of the sum of the unit vectors is the sum of all cosines, the diagonal included.
        directions: that sum, (B, D); lengths of the vectors (B, T), padding 0; noise (B, T): how far rounding moves a vector.
        That turns it by at most noise / length (at most 1 is counted), and a cosine moves by no more than its
        two angles: the floor.
        """
        absent = lengths == 0
        total = directions.double().square().sum(1)  # (B,)
        cosine = (total - (~absent).sum(1)) / (self.count * (self.count - 1))
        turn = (noise / lengths).clamp(max=1).masked_fill(absent, 1)[..., None]
        floor = 2 * (turn if self.real is None else turn * self.real[..., None]).sum(dim=(1, 2)) / self.count
        return cosine.clamp(-1, 1).where(self.count != 1, torch.nan), floor

    def mean_absolute_cosine(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """Mean |cosine| over pairs of different real tokens (B,), NaN where there is no pair; sample by sample, T² numbers each."""
        units = vectors / divisors(lengths, vectors)
        with torch.autocast(units.device.type, enabled=False):
            every = torch.stack([(u @ u.T).abs().sum(dtype=torch.float64) for u in units])
        pairs = self.count * (self.count - 1)
        return ((every - (lengths > 0).sum(1)) / pairs).clamp(0, 1).where(self.count != 1, torch.nan)


def _eps(x: Tensor) -> float:
    """Of the coarsest dtype that a stream was computed in, as far as is known here."""
    eps = torch.finfo(x.dtype).eps
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(x.device.type)).eps)
    return eps


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; 0 where whole is 0, since so is the part."""
    return part / whole.masked_fill(whole == 0, 1)
