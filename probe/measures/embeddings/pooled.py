"""What reads plain passes for embeddings: the tokens of each layer, pooled as the model pools its last ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rc_probe.data.batches import Batch
from rc_probe.engine import PlainReader
from rc_probe.hooks.errors import RcProbeError
from rc_probe.tasks.retrieval import Embedding, pool

Pooled = tuple[int, dict[int, Tensor]]  # start of a batch, and (rows, dim) by layer


class PooledReader(PlainReader):
    """The embedding of each sample at each layer is kept, samples × dim × layers floats; nothing of tokens is.

    The last one is the model's own, which `task` reads off its output. seen: of each batch; eps: of its floats
    error: why an output has no embedding; the pass, which others may read, too, goes on
    """

    wants_output = True

    def __init__(self, task: Embedding, depth: int) -> None:
        self.task, self.depth, self.seen = task, depth, list[Pooled]()
        self.eps = 0.0
        self.error: RcProbeError | None = None

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        self.seen.append((batch.start, {}))

    def plain(self, layer: int, x: Tensor) -> None:
        self.eps = torch.finfo(x.dtype).eps
        if layer < self.depth:
            self.seen[-1][1][layer] = pool(x, self.batch.mask, self.task.pooling).cpu()

    def output(self, name: str, output: Any) -> None:
        prepared = self.task.prepare(self.batch.as_made)
        try:
            self.seen[-1][1][self.depth] = self.task.pooled(output, prepared).cpu()
        except RcProbeError as error:
            self.error = error


def together(parts: Iterable[Pooled]) -> dict[int, Tensor]:
    """By layer (samples, dim), of all batches of all processes, in the order of the data."""
    ordered = sorted(parts, key=lambda part: part[0])
    return {layer: torch.cat([found[layer] for _, found in ordered]) for layer in ordered[0][1]}
