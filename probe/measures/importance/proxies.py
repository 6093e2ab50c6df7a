"""Proxies: what others take for the importance of a block or a branch, from the plain pass alone.

They are measured to be compared with what a removal costs, and for the window of least angular distance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from math import pi
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from rc_probe.data.batches import Batch
from rc_probe.engine import PlainReader
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.pairs.given import added
from rc_probe.hooks.structure.structure import Site, Structure
from rc_probe.results.tables import Row

BRANCHES = "branches"  # the name of the pass that reads them
Read = tuple[int, dict[Any, Tensor]]  # start of a batch, and of each key its samples' numbers


class BlockReader(PlainReader):
    """Block influence of each block, and the angular distance over each run of up to `most` blocks.

    A block behind which the stream has another shape (tokens merged before it) has neither. seen: of each batch its start and, by (block from 1, how many blocks), the samples' means over real tokens:
    1 − cos and arccos(cos) / π between the stream that enters the first block and what leaves the last
    """

    def __init__(self, most: int = 1) -> None:
        self.most, self.seen = most, list[Read]()

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        self._before: list[Tensor] = []  # unit vectors of the layers before, the last one first
        self.seen.append((batch.start, {}))

    def plain(self, layer: int, x: Tensor) -> None:
        x = normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
        self._before = [earlier for earlier in self._before if earlier.shape == x.shape]
        for blocks, earlier in enumerate(self._before, 1):
            cosine = (earlier * x).sum(-1).double().clamp(-1, 1)
            both = torch.stack([1 - cosine, cosine.acos() / pi])
            self.seen[-1][1][layer - blocks + 1, blocks] = mean_of_tokens(both, self.batch.mask).cpu()
        self._before = [x, *self._before][: self.most]


class BranchReader:
    """How large each branch is beside the stream that it is added to, and how they are turned to each other.

    It reads the pass BRANCHES, whose edits change nothing. seen: as above, by (block from 1, kind): ‖branch‖ / ‖stream‖
    and cos(branch, stream)
    """

    wants_output = False

    def __init__(self, structure: Structure) -> None:
        self.structure, self.seen = structure, list[Read]()
        self._values: dict[Site, Tensor] = {}

    @property
    def edits(self) -> Edits:
        """Those of the pass BRANCHES."""
        edits = Edits()
        for block in self.structure.blocks:
            for site in (site for junction in block.junctions for site in junction.sites):
                edits.at(site, partial(self._keep, site))
        return edits

    def _keep(self, site: Site, x: Tensor) -> Tensor:
        self._values[site] = x.clone()
        return x

    def begin(self, batch: Batch) -> None:
        self.batch = batch
        self._values.clear()
        self.seen.append((batch.start, {}))

    def stream(self, name: str, layer: int, x: Tensor) -> None:
        if name != BRANCHES or layer == 0:
            return
        block = self.structure.blocks[layer - 1]
        for junction in block.junctions:
            branches = added(block, junction, self._values, x)
            stream = branches.pop("")
            for kind, branch in branches.items():
                size = branch.norm(dim=-1) / stream.norm(dim=-1).clamp_min(1e-300)
                both = torch.stack([size, cosine_similarity(branch, stream, dim=-1)])
                self.seen[-1][1][layer, kind] = mean_of_tokens(both, self.batch.mask).cpu()
        self._values.clear()

    def as_plain(self, name: str, layers: range) -> None:
        """Branches are read in their own pass alone."""

    def output(self, name: str, output: Any) -> None:
        """Operands are all that is read."""


def mean_of_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """(n, batch, tokens) -> (n, batch): the mean over real tokens."""
    if mask is None:
        return values.mean(-1)
    real = mask.to(values.device)
    return values.where(real, 0).sum(-1) / real.sum(-1)


def together(parts: Iterable[Read]) -> dict[Any, Tensor]:
    """Of all batches of all processes, in the order of the data: by key (n, samples)."""
    ordered = sorted(parts, key=lambda part: part[0])
    return {key: torch.cat([found[key] for _, found in ordered], -1) for key in ordered[0][1]}


def proxy_rows(component: str, block: int, names: Sequence[str], values: Tensor) -> list[Row]:
    """Rows of the table `importance`. values (n, samples): of the metrics `names`."""
    return [
        {"component": component, "block": block, "head": None, "metric": name, "value": float(mine.mean()),
         "baseline": None, "change": None, "low": None, "high": None, "count": len(mine)}
        for name, mine in zip(names, values, strict=True)
    ]  # fmt: skip
