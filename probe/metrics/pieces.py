"""A batch of streams in pieces: on the CPU a few samples at a time, so that what is computed of them stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

CACHED = 2**20  # entries of a piece: they fit into a cache, and operations cost more than their calls
DEAR = 2**14  # entries of a sample from which on it is dearer to go around padding than to take samples apart
WIDE = 2048  # dimensions up to which float32 sums squares more exactly than a stream is known
LEAST, MOST = 1e-12, 1e18  # lengths whose squares float32 holds, and the squares of all that counts in them


class Piece:
    """Some samples of a batch: the real tokens x (k, n, D) of each, or all tokens (B, T, D), some of them absent.

    samples: where they are in what is (B, …); tokens: where theirs are in what is (B, T)
    count: real tokens of each, to divide by; absent: (B, T) bool, None: none is
    """

    def __init__(
        self, x: Tensor, samples: slice, tokens: Any, count: Tensor | int, absent: Tensor | None = None
    ) -> None:
        self.x, self.samples, self.tokens, self.count, self.absent = x, samples, tokens, count, absent

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

    def clear(self, y: Tensor) -> Tensor:
        """Make what y (k, n, …) has of absent tokens 0."""
        return cleared(y, self.absent)

    def _mean(self, y: Tensor) -> Tensor:
        return y.sum(-2, keepdim=True) / self.count


def cleared(y: Tensor, absent: Tensor | None) -> Tensor:
    """y (k, n, …), in place, 0 where tokens are absent (k, n)."""
    if absent is None:
        return y
    return y.masked_fill_(absent if y.ndim == 2 else absent[..., None], 0)


def lengths_of(y: Tensor, absent: Tensor | None = None) -> Tensor:
    """‖y_i‖₂ (k, n), float64, of vectors (k, n, D), absent ones 0: of each from float32 where that is as exact."""
    if y.device.type != "cpu" or y.dtype != torch.float32 or y.shape[-1] > WIDE:
        return cleared(torch.linalg.vector_norm(y, dim=-1, dtype=torch.float64), absent)
    found = torch.linalg.vector_norm(y, dim=-1).double()
    known = found if absent is None else found.masked_fill(absent, 1)
    low, high = map(float, known.aminmax()) if known.numel() else (1.0, 1.0)
    if not (low > LEAST and high < MOST):  # so, too, where one is NaN
        exact = (found > LEAST) & (found < MOST)
        found = found.where(exact, torch.linalg.vector_norm(y, dim=-1, dtype=torch.float64))
    return cleared(found, absent)


def whole(x: Tensor, real: Tensor | None) -> Piece:
    """The batch as one piece."""
    everywhere = slice(None), slice(None)
    if real is None:  # a tensor: GPUs multiply by the rounded inverse of a plain number
        return Piece(x, slice(None), everywhere, x.new_full((), x.shape[1]))
    return Piece(x, slice(None), everywhere, real.sum(1).to(x.dtype)[:, None, None], ~real)


def pieces(x: Tensor, real: Tensor | None) -> Iterator[Piece]:
    """x: (B, T, D), anything where tokens are not `real` (B, T), None: all are."""
    samples, tokens, dim = x.shape
    if x.device.type != "cpu" or not samples or tokens * dim < DEAR:
        yield whole(x, real)
        return
    runs = [(0, tokens, tokens)] * samples if real is None else _runs(real)
    start = 0
    for (first, end, n), alike in groupby(runs):
        stop = start + len(list(alike))
        # where tokens come first in memory, the order of sums depends on how many samples there are
        most = max(1, CACHED // max(n * dim, 1)) if end - first == n and x.is_contiguous() else 1
        for at in range(start, stop, most):
            here = slice(at, min(at + most, stop))
            those: Any = slice(first, end)
            if end - first != n and real is not None:
                those = real[at].nonzero()[:, 0]
            yield Piece(x[here, those], here, (here, those), n)
        start = stop


def _runs(real: Tensor) -> list[tuple[int, int, int]]:
    """Of each sample the first real token, the end of the last one, and how many there are."""
    marks = real.numpy()  # of so few numbers much faster than torch
    ends = marks.shape[1] - marks[:, ::-1].argmax(1)
    counts = marks.sum(1).tolist()
    return [
        (first, end if n else 0, n)
        for first, end, n in zip(marks.argmax(1).tolist(), ends.tolist(), counts, strict=True)
    ]


def divisors(lengths: Tensor, y: Tensor) -> Tensor:
    """Lengths (…, T) to divide y (…, T, D) by, 1 instead of 0."""
    return lengths.masked_fill(lengths == 0, 1)[..., None].to(y.dtype)
