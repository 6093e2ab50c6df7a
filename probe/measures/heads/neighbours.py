"""Nearest neighbour in the wild: which other token a head finds best with less rank, beside the whole head and the nearest one.

The target of Amsel, Yehudai, Bruna 2024 as a retrieval score: points are the model's own keys of a sample, at equal positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rc_probe.data.batches import Batch
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.heads.forms import Heads
from rc_probe.hooks.heads.operands import watch_projections
from rc_probe.hooks.heads.rank import rank_matrices
from rc_probe.hooks.structure.structure import Structure
from rc_probe.interventions.rank import METHODS
from rc_probe.registry import WHOLE
from rc_probe.results.tables import Row

if TYPE_CHECKING:
    from rc_probe.processes.world import World

Hits = dict[
    tuple[int, str, int], Tensor
]  # by block from 1, method and rank: (2, heads) of `retrieval` and `nearest`


class NeighbourReader:
    """Reads plain passes that run with `edits`; all numbers are of one pass, whatever the rank."""

    wants_output = False

    def __init__(self, structure: Structure, heads: Sequence[Heads], ranks: Sequence[int]) -> None:
        self.structure, self.ranks = structure, ranks
        self.edits, self.hits, self.tokens = Edits(), Hits(), dict[int, int]()
        self._query: dict[int, Tensor] = {}
        self._matrices: dict[tuple[int, str, int], Tensor] = {}
        self._name = ""  # of the pass that runs; none before a batch begins, as in proofs
        self._mask: Tensor | None = None
        for each in heads:
            self.edits = self.edits.then(watch_projections(each, partial(self._read, each)))

    def begin(self, batch: Batch) -> None:
        self._mask, self._name = batch.mask, WHOLE

    def stream(self, name: str, layer: int, x: Tensor) -> None:
        """Streams are not what is read."""

    def as_plain(self, name: str, layers: range) -> None:
        self._name = name

    def output(self, name: str, output: Any) -> None:
        """Nor are answers."""

    def _read(self, heads: Heads, part: str, z: Tensor, vectors: Tensor) -> None:
        if self._name != WHOLE:
            return
        if part == "query":
            self._query[heads.block.index] = vectors
        elif self._mask is None or self._mask.shape == z.shape[:2]:
            self._count(heads, z, self._query[heads.block.index], vectors.repeat_interleave(heads.groups, 2))

    def _count(self, heads: Heads, z: Tensor, query: Tensor, key: Tensor) -> None:
        """query, key: (batch, tokens, heads, width)."""
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        real = torch.ones(z.shape[:2], dtype=torch.bool) if self._mask is None else self._mask
        real = real.to(z.device)
        barred = ~real[:, None, None] | torch.eye(
            z.shape[1], dtype=torch.bool, device=z.device
        )  # padding, and itself

        def best(scores: Tensor) -> Tensor:
            return scores.masked_fill(barred, -torch.inf).argmax(-1)

        unit = normalize(z.double(), dim=-1)
        nearest, whole = best((unit @ unit.mT)[:, None]), best(query @ key.mT)
        block = heads.block.index + 1
        self.tokens[block] = self.tokens.get(block, 0) + int(real.sum())
        for method, rank in [*((m, r) for m in METHODS for r in self.ranks), ("", heads.width)]:
            found = (
                whole if not method else best(query @ self._matrix(heads, method, rank).to(z.device) @ key.mT)
            )
            hits = (
                torch.stack([(found == target) & real[:, None] for target in (whole, nearest)])
                .sum((1, 3))
                .double()
                .cpu()
            )
            self.hits[block, method, rank] = self.hits.get((block, method, rank), 0) + hits

    def _matrix(self, heads: Heads, method: str, rank: int) -> Tensor:
        key = heads.block.index, method, rank
        if key not in self._matrices:
            self._matrices[key] = rank_matrices(self.structure, heads, rank, method)
        return self._matrices[key]

    def rows(self, world: World) -> list[Row]:
        """Of the table `truncation`, all processes together."""
        parts = world.gather((self.hits, self.tokens), what="neighbours")
        hits, tokens = Hits(), dict[int, int]()
        for found, counted in parts:
            for key, value in found.items():
                hits[key] = hits[key] + value if key in hits else value
            for block, count in counted.items():
                tokens[block] = tokens.get(block, 0) + count
        return [row for key, value in hits.items() if key[1] for row in _rows(key, value, hits, tokens)]


def _rows(key: tuple[int, str, int], value: Tensor, hits: Hits, tokens: dict[int, int]) -> Iterator[Row]:
    block, method, rank = key
    whole = next(found for (other, name, _), found in hits.items() if other == block and not name)
    for place, metric in enumerate(("retrieval", "nearest")):
        for head in range(value.shape[1]):
            share, own = (float(x[place, head]) / tokens[block] for x in (value, whole))
            yield {
                "block": block, "head": head + 1, "rank": rank, "method": method, "metric": metric, "value": share,
                "baseline": own, "change": share - own,
            }  # fmt: skip
