"""How far the rows of attention move when heads are truncated: KL from the whole model's, on the same inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rc_probe.data.batches import Batch
from rc_probe.hooks.edits.attention_patterns import pattern_edits
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import Block, Branch, Structure
from rc_probe.registry import WHOLE
from rc_probe.results.tables import Row

if TYPE_CHECKING:
    from rc_probe.processes.world import World

    from .truncated import Cell

METRIC = "attention_kl"


class DivergenceReader:
    """targets: by the name of a pass, which block it truncates, and which head (from 1, None for all)."""

    wants_output = False

    def __init__(self, targets: Mapping[str, tuple[int | None, int | None]]) -> None:
        self.targets = targets
        self.sums: dict[str, tuple[float, int]] = {}  # by pass: Σ KL, rows
        self._plain: dict[int, Tensor] = {}  # of the batch that runs
        self._name = ""  # of the pass that runs; none before a batch begins, as in proofs
        self._mask: Tensor | None = None

    def watched(self, structure: Structure, blocks: Iterable[Block]) -> tuple[Edits, list[str]]:
        """Edits that read the patterns of these blocks; none, and a note, where these cannot be seen."""
        try:
            return pattern_edits(structure, self._on_pattern, blocks=blocks), []
        except RcProbeError as error:
            return Edits(), [f"Rows of attention were not compared: {error}"]

    def begin(self, batch: Batch) -> None:
        self._mask, self._name = batch.mask, WHOLE

    def stream(self, name: str, layer: int, x: Tensor) -> None:
        """Streams are not what is read."""

    def as_plain(self, name: str, layers: range) -> None:
        self._name = name

    def output(self, name: str, output: Any) -> None:
        """Nor are answers."""

    def _on_pattern(self, block: Block, branch: Branch, pattern: Tensor) -> None:
        if branch.kind != "attention" or not self._name:
            return
        if self._name == WHOLE:
            self._plain[block.index] = pattern
            return
        truncated, head = self.targets.get(self._name, (None, None))
        if truncated not in (None, block.index + 1):
            return
        p, q = self._plain[block.index], pattern
        if head is not None:
            p, q = p[:, head - 1 : head], q[:, head - 1 : head]
        p, q = p.float(), q.float().clamp_min(torch.finfo(torch.float32).tiny)
        rows = (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)
        rows = rows.clamp_min(0).double()  # (batch, heads, queries); below 0 by rounding alone
        if self._mask is not None and self._mask.shape == (rows.shape[0], rows.shape[2]):
            real = self._mask.to(rows.device)[:, None].expand_as(rows)
            rows = rows[real]
        total, count = self.sums.get(self._name, (0.0, 0))
        self.sums[self._name] = total + float(rows.sum()), count + rows.numel()

    def rows(self, world: World, cells: Sequence[Cell]) -> list[Row]:
        """Of the table `truncation`, all processes together."""
        parts = world.gather(self.sums, what="rows of attention")
        found = []
        for cell in cells:
            seen = [part[cell.name] for part in parts if cell.name in part]
            if seen:
                value = sum(total for total, _ in seen) / sum(count for _, count in seen)
                found.append(
                    {**cell.place, "metric": METRIC, "value": value, "baseline": 0.0, "change": value}
                )
        return found
