"""Streams of plain passes that others of a run have made, so that paths make none again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rc_probe.engine import PlainReader
from rc_probe.hooks.structure.structure import Structure

LIMIT = 2**28  # bytes that are kept


class LastStreams(PlainReader):
    """Reads every plain pass of a run and keeps the stream after the last block, of the first `rows` rows of its data.

    >>> streams = LastStreams(structure, rows=16)                     # doctest: +SKIP
    >>> engine.run(structure, batches, {}, [streams])                  # doctest: +SKIP
    >>> streams.of(batch.inputs)                                       # doctest: +SKIP

    Those of models in half precision are none of paths, which are computed in float32.
    """

    every_run = True

    def __init__(self, structure: Structure, rows: int) -> None:
        self.depth, self.rows, self.room = structure.depth, rows, LIMIT
        self.kept: list[tuple[dict[str, Any], Tensor]] = []

    def plain(self, layer: int, x: Tensor) -> None:
        size = x.numel() * x.element_size()
        if layer != self.depth or self.batch.start >= self.rows or size > self.room:
            return
        if self.of(self.batch.inputs) is None:
            self.room -= size
            self.kept.append((self.batch.inputs, x.clone()))

    def of(self, inputs: dict[str, Any]) -> Tensor | None:
        """The stream (batch, tokens, dim) of a pass on exactly these inputs; None where there was none."""
        return next((x for kept, x in self.kept if _same(kept, inputs)), None)


def kept_streams(structure: Structure, rows: int) -> LastStreams | None:
    """What keeps them; None of models whose paths are computed in another precision than their passes."""
    kinds = {p.device.type for p in structure.model.parameters()} - {"meta"}
    dtypes = {p.dtype for p in structure.model.parameters() if p.is_floating_point()}
    whole = dtypes <= {torch.float32, torch.float64} and not any(map(torch.is_autocast_enabled, kinds))
    return LastStreams(structure, rows) if whole else None


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all()))
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)
