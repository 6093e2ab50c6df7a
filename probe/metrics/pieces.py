"""A batch of streams in pieces: on the CPU sample by sample, so that what is computed of one stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

CACHED = 2**18  # entries of a batch that fit into a processor's cache
DEAR = 2**14  # entries of a sample on which operations cost more than their calls
WIDE = 2048  # dimensions up to which float32 sums squares more exactly than a stream is known
LEAST, MOST = 1e-12, 1e18  # lengths whose squares float32 holds, and the squares of all that counts in them


class Piece:
    """The real tokens x (n, D) of one sample, or all tokens (B, T, D) of a batch, some of them absent.

    sample: where it is in what is (B, …); tokens: where its tokens are in what is (B, T)
    count: real tokens, to divide by; absent: (B, T) bool, None: none is
    """

    def __init__(
        self,
        x: Tensor,
        sample: int | EllipsisType,
        tokens: Any,
        count: Tensor | int,
        absent: Tensor | None = None,
    ) -> None:
        self.x, self.sample, self.tokens, self.count, self.absent = x, sample, tokens, count, absent

    def centred(self, out: Tensor) -> Tensor:
        """res(X) = X - 1 mean(X)ᵀ, absent tokens 0, in `out`.

        The mean is subtracted twice. The first mean is rounded, and that error, the same in all rows, would
        alone show as a residual of 1.6e-7 in float32; the second mean is that error, and takes it away.
        """
        if self.absent is None:
            torch.sub(self.x, self._mean(self.x), out=out)
        else:
            self.clear(out.copy_(self.x))
            self.clear(out.sub_(self._mean(out)))
        return self.clear(out.sub_(self._mean(out)))

    def lengths(self, y: Tensor) -> Tensor:
        """‖y_i‖₂, float64, of something of the form of x, absent ones 0: of each token from float32 where that is as exact."""
        if y.device.type != "cpu" or y.dtype != torch.float32 or y.shape[-1] > WIDE:
            return self.clear(torch.linalg.vector_norm(y, dim=-1, dtype=torch.float64))
        lengths = torch.linalg.vector_norm(y, dim=-1).double()
        exact = (lengths > LEAST) & (lengths < MOST)  # false of NaN
        if not bool((exact if self.absent is None else exact | self.absent).all()):
            lengths = lengths.where(exact, torch.linalg.vector_norm(y, dim=-1, dtype=torch.float64))
        return self.clear(lengths)

    def clear(self, y: Tensor) -> Tensor:
        """Make what y (…, n) or (…) has of absent tokens 0."""
        if self.absent is None:
            return y
        return y.masked_fill_(self.absent if y.ndim == 2 else self.absent[..., None], 0)

    def _mean(self, y: Tensor) -> Tensor:
        return y.sum(-2, keepdim=True) / self.count


def pieces(x: Tensor, real: Tensor | None, count: Tensor) -> Iterator[Piece]:
    """x: (B, T, D), anything where tokens are not `real` (B, T), None: all are; count (B,): how many."""
    if x.device.type != "cpu" or x.numel() <= CACHED or x[0].numel() < DEAR:
        yield Piece(x, ..., ..., count.to(x.dtype)[:, None, None], None if real is None else ~real)
        return
    for sample, one in enumerate(x):
        if real is None:
            yield Piece(one, sample, sample, len(one))
            continue
        places = real[sample].nonzero()[:, 0]
        n, first = len(places), int(places[0]) if len(places) else 0
        if not n or int(places[-1]) == first + n - 1:
            run = slice(first, first + n)
            yield Piece(one[run], sample, (sample, run), n)
        else:
            yield Piece(one[places], sample, (sample, places), n)


def divisors(lengths: Tensor, y: Tensor) -> Tensor:
    """Lengths (…, T) to divide y (…, T, D) by, 1 instead of 0."""
    return lengths.masked_fill(lengths == 0, 1)[..., None].to(y.dtype)
