"""The rank of each head's scores on data."""

from __future__ import annotations

from torch import Tensor

from rc_probe.data.batches import Batch
from rc_probe.engine import PlainReader
from rc_probe.metrics.spectra import centred_rank


class RankReader(PlainReader):
    """Reads what enters the attention ops of plain passes. seen: of each batch its start and, by block, (samples, heads)."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.seen: list[tuple[int, dict[int, Tensor]]] = []

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        self.seen.append((batch.start, {}))

    def plain(self, layer: int, x: Tensor) -> None:
        """Streams only say how many tokens there are."""
        self.tokens = tuple(x.shape[:2])

    def operands(self, block: int, query: Tensor, key: Tensor) -> None:
        """(batch, heads, tokens, width) each. Within windows there is no one rank of a sample."""
        if (query.shape[0], query.shape[2]) != self.tokens or key.shape[2] != query.shape[2]:
            return
        start, found = self.seen[-1]
        ranks = centred_rank(query, key, self.batch.mask).cpu()
        found[block] = ranks[: max(self.samples - start, 0)]
