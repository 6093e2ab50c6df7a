"""Second moments of queries and keys on the data, streamed: what a low rank should keep of a head's form."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.structure.structure import Structure

from .forms import Heads
from .operands import watch_projections

Sums = dict[tuple[int, str], Tensor]  # by block and `query` or `key`: (heads, width, width) float64
_kept: weakref.WeakKeyDictionary[Structure, dict[int, tuple[Tensor, Tensor]]] = weakref.WeakKeyDictionary()


class Moments:
    """E[q qᵀ] and E[k kᵀ] of each head before positions turn them, over the real tokens of plain passes.

    A reader of the engine, whose passes run with `edits`. It keeps (query heads + key heads) · width² float64 numbers a
    block, at most those of two d × d matrices of it, and nothing grows with the data.
    """

    wants_output = False

    def __init__(self, structure: Structure, heads: Iterable[Heads]) -> None:
        self.structure, self.sums, self.edits = structure, Sums(), Edits()
        self._mask: Tensor | None = None
        for each in heads:
            self.edits = self.edits.then(watch_projections(each, partial(self._read, each)))

    def begin(self, batch: Any) -> None:
        self._mask = batch.mask

    def stream(self, name: str, layer: int, x: Tensor) -> None:
        """Streams are not what is read."""

    def as_plain(self, name: str, layers: range) -> None:
        """What is not run again is not read again."""

    def output(self, name: str, output: Any) -> None:
        """Nor are answers."""

    def _read(self, heads: Heads, part: str, x: Tensor, mine: Tensor) -> None:
        if self._mask is not None:
            if self._mask.shape != mine.shape[:2]:
                what = f"its projections read {tuple(mine.shape[:2])} tokens, and the samples have {tuple(self._mask.shape)}"
                raise self.structure.error(heads.block, what, "Use :weights in place of :data")
            mine = mine * self._mask.to(mine.device)[..., None, None]
        rows = mine.flatten(0, -3)
        sums = torch.einsum("nhw,nhv->hwv", rows, rows).cpu()
        key = heads.block.index, part
        self.sums[key] = self.sums[key] + sums if key in self.sums else sums

    def keep(self, parts: Iterable[Sums]) -> None:
        """The sums of all processes together, for edits of this structure that need them."""
        whole = Sums()
        for sums in parts:
            for key, value in sums.items():
                whole[key] = whole[key] + value if key in whole else value
        blocks = {block for block, _ in whole}
        _kept.setdefault(self.structure, {}).update(
            {block: (whole[block, "query"], whole[block, "key"]) for block in blocks}
        )


def kept_moments(structure: Structure, heads: Heads) -> tuple[Tensor, Tensor]:
    """Of queries and of keys (heads, width, width), keys repeated for their groups; up to a factor."""
    found = _kept.get(structure, {}).get(heads.block.index)
    if found is None:
        todo = "Give readings=: keyword arguments of forward passes on your data"
        raise structure.error(
            heads.block, "the queries and keys of the plain model were not read on any data", todo
        )
    return found[0], found[1].repeat_interleave(heads.groups, 0)
