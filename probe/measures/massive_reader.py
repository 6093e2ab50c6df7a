"""What reads plain passes for massive tokens. Its sums do not grow with the samples, only with distinct tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from rc_probe.engine import PlainReader
from rc_probe.metrics.moments import Moments, pack, unpack
from rc_probe.metrics.stream_metrics import residual_of
from rc_probe.metrics.tokens import Tokens
from rc_probe.registry import MASSIVE
from rc_probe.results.tables import Row

Key = tuple[int, int, int]  # layer, position from 1, token id (-1: none is known)


@dataclass
class Seen:
    """One token at one position of one layer. norms, shares: sums over the samples in which it is massive."""

    samples: int = 0
    norms: float = 0.0
    shares: float = 0.0
    coordinates: Counter[int] = field(default_factory=Counter)

    def add(self, other: Seen) -> None:
        self.samples += other.samples
        self.norms += other.norms
        self.shares += other.shares
        self.coordinates.update(other.coordinates)


class MassiveReader(PlainReader):
    """factors: over so many times the median norm a token is left out, each by itself."""

    def __init__(self, factors: Sequence[int]) -> None:
        self.factors = factors
        self.seen: dict[Key, Seen] = {}
        self.residuals: dict[tuple[int, str], Moments] = {}

    def plain(self, layer: int, x: Tensor) -> None:
        mask = self.batch.mask
        mask = None if mask is None or mask.shape != x.shape[:2] else mask.to(x.device)
        tokens = Tokens(x, mask, angles=False)
        self._residuals(layer, tokens)
        places = tokens.massive.nonzero()
        if not len(places):
            return
        real = torch.ones_like(tokens.massive) if mask is None else mask.bool()
        positions = real.cumsum(1)
        ids = self.batch.inputs.get("decoder_input_ids", self.batch.inputs.get("input_ids"))
        if not isinstance(ids, Tensor) or ids.shape != x.shape[:2]:
            ids = torch.full(x.shape[:2], -1)
        b, t = places.unbind(1)
        vectors, norms = x[b, t].double(), tokens.lengths[b, t]
        largest, coordinate = vectors.abs().max(1)
        columns = (
            positions[b, t], ids.to(x.device)[b, t], norms / tokens.median[b],
            (largest / norms).square(), coordinate,
        )  # fmt: skip
        for position, token, norm, share, where in zip(*(c.tolist() for c in columns), strict=True):
            one = Seen(1, norm, share, Counter({where: 1}))
            self.seen.setdefault((layer, position, token), Seen()).add(one)

    def _residuals(self, layer: int, tokens: Tokens) -> None:
        enough = tokens.count >= 2
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for factor in self.factors:
            left_out = tokens.massive if factor == MASSIVE else tokens.longer(factor)
            same = factor != MASSIVE and torch.equal(left_out, tokens.massive)
            rest = tokens.bulk if same or factor == MASSIVE else tokens.without(left_out)
            found[str(factor)] = residual_of(rest)
        for name, reading in found.items():
            both = torch.stack(reading, 1)
            self.residuals.setdefault((layer, name), Moments(both.device)).add(both, enough)

    # ---- several processes

    def pack(self) -> Any:
        return list(self.seen.items()), pack(self.residuals)

    @classmethod
    def merged(cls, packs: Iterable[Any]) -> Self:
        """All that was packed, in one."""
        whole, several = cls(()), list(packs)
        for seen, _ in several:
            for key, one in seen:
                whole.seen.setdefault(key, Seen()).add(one)
        whole.residuals = unpack(sums for _, sums in several)
        return whole

    # ---- what it says

    def rows(self, most: int, text: Callable[[int], str]) -> list[Row]:
        """Rows of the table `massive`: at most `most` of a layer, the largest first."""
        rows: list[Row] = []
        for layer in sorted({key[0] for key in self.seen}):
            here = sorted(
                ((key, one) for key, one in self.seen.items() if key[0] == layer),
                key=lambda pair: (-pair[1].norms / pair[1].samples, pair[0]),
            )
            rows += [
                {
                    "layer": layer, "position": position, "token": text(token), "samples": one.samples,
                    "norm_over_median": one.norms / one.samples, "coordinate": _most_frequent(one.coordinates),
                    "coordinate_share": one.shares / one.samples,
                }
                for (_, position, token), one in here[:most]
            ]  # fmt: skip
        return rows

    def level_rows(self) -> list[Row]:
        """Rows of the table `massive_levels`."""
        return [
            {"massive": int(name), "layer": layer, "mean": float(m.mean[0]), "floor": float(m.mean[1])}
            for (layer, name), m in sorted(self.residuals.items(), key=lambda kv: (int(kv[0][1]), kv[0][0]))
        ]


def _most_frequent(counts: Counter[int]) -> int:
    return min(counts, key=lambda at: (-counts[at], at))
