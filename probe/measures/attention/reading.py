"""What the patterns of the first samples say, gathered sample by sample: rows of the tables of `Attention`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rc_probe.measures.chained_products import identity, multiplied
from rc_probe.metrics import pattern_metrics as metrics
from rc_probe.metrics.mask_graph import MaskGraph
from rc_probe.results.tables import Row

from .first_patterns import Pattern, Sample

VACUOUS = 0.99  # a bound above it promises less than a hundredth
Head = tuple[int, str, int]  # block from 1, component, head from 1


@dataclass
class _Product:
    """The product of the head-averaged patterns of the blocks so far, and what the theorem makes of them."""

    tokens: int
    device: torch.device
    blocks: int = 0
    bound: float = 1.0  # the theorem's, the best of those of the first blocks
    paths: float = 1.0  # the product of each block's largest coefficient of one head
    least: Tensor | None = None  # of each pair of tokens, the smallest weight so far
    common: Tensor | None = None  # edges of all blocks so far

    def __post_init__(self) -> None:
        self.mean, self.deviation = identity(self.tokens, self.device)

    def times(self, averaged: Tensor, seen: Tensor, largest: float) -> None:
        self.mean, self.deviation = multiplied(averaged, self.mean, self.deviation)
        self.blocks += 1
        self.paths *= largest
        self.least = averaged if self.least is None else torch.minimum(self.least, averaged)
        self.common = seen if self.common is None else self.common & seen

    def weight(self) -> float:
        """ε: the smallest weight on an edge that all blocks have."""
        assert self.least is not None and self.common is not None
        return float(self.least[self.common].min()) if bool(self.common.any()) else 0.0


@dataclass
class Reading:
    """cubes: also what takes tokens³ operations a pattern. Values by head and metric, a sample after the other."""

    cubes: bool = True
    values: dict[tuple[Head, str], list[float]] = field(default_factory=dict)
    sinks: dict[tuple[Head, int, int], list[float]] = field(default_factory=dict)  # and position, token id
    masks: dict[int, list[Row]] = field(default_factory=dict)  # by block
    why: str = ""  # why there is no product
    clipped: bool = False  # whether a weight on an edge was exactly zero
    samples: int = 0

    def add(self, sample: Sample) -> None:
        self.samples += 1
        product: _Product | None = None
        graphs: list[tuple[Tensor, MaskGraph]] = []
        first: dict[tuple[int, str], int] = {}  # heads of a component so far: several ops count on
        for pattern in sample.patterns:
            place = pattern.block.index + 1, pattern.branch.kind
            start = first.setdefault(place, 0)
            first[place] += pattern.heads
            largest = self._heads(pattern, place, start, sample)
            if pattern.branch.kind != "attention" or self._unlike(pattern, start):
                continue
            seen = pattern.seen[0].any(0)
            averaged = pattern.weights[0].mean(0, dtype=torch.float64)
            row = _graph_row(_graph(seen, graphs), float(averaged[seen].min()))
            if self.cubes and not self.why:
                if product is None:
                    product = _Product(sample.tokens, averaged.device)
                product.times(averaged, seen, largest)
                assert product.common is not None
                row |= _product_row(product, averaged, _graph(product.common, graphs))
            self.masks.setdefault(place[0], []).append(row)

    def _unlike(self, pattern: Pattern, start: int) -> bool:
        """Whether the graph is not one of the tokens; says why there is no product."""
        windows, _, queries, keys = pattern.weights.shape
        if not pattern.whole or windows > 1 or queries != keys:
            self.why = "patterns of windows have no product"
            return True
        tolerance = max(1e-5, 4 * torch.finfo(pattern.weights.dtype).eps)
        if bool(((pattern.weights.sum(-1, dtype=torch.float64) - 1).abs() > tolerance).any()):
            self.why = "rows of its patterns do not sum to one"
        if start:
            self.why = f"block {pattern.block.index + 1} has several attention operations"
        return bool(start)

    # ---- heads

    def _heads(self, pattern: Pattern, place: tuple[int, str], start: int, sample: Sample) -> float:
        """What each head does; returns the largest Dobrushin coefficient."""
        weights, seen = pattern.weights, pattern.seen
        received = metrics.received(weights, seen)
        most = received.nan_to_num(-1).amax(1)
        variance, phase = metrics.logit_variance(weights, seen)
        found = {
            "entropy": metrics.entropy(weights, seen),
            "sink": most.masked_fill(most < 0, math.nan),
            "sink_share": (most > metrics.SINK).double().masked_fill(most < 0, math.nan),
            "logit_variance": variance,
            "phase": phase,
            "least_weight": metrics.least_weight(weights, seen),
        }
        if self.cubes:
            found["dobrushin"] = metrics.dobrushin(weights)
            found["singular_gap"] = metrics.singular_gap(weights)
        self.clipped |= bool((found["least_weight"] == 0).any())
        for name, values in found.items():
            for head, value in enumerate(values.tolist(), start + 1):
                self.values.setdefault(((*place, head), name), []).append(value)
        self._sinks(received, place, start, sample)
        return float(found["dobrushin"].max()) if self.cubes else math.nan

    def _sinks(self, received: Tensor, place: tuple[int, str], start: int, sample: Sample) -> None:
        ids = sample.ids.get(place[1])
        known = ids is not None and len(ids) == received.shape[1]
        for head, key in (received > metrics.SINK).nonzero().tolist():
            token = int(ids[key]) if known and ids is not None else -1
            at = (*place, start + head + 1), key + 1, token
            self.sinks.setdefault(at, []).append(float(received[head, key]))

    # ---- rows and notes

    def notes(self) -> list[str]:
        found = [f"No product of attention patterns: {self.why}."] if self.why else []
        if self.clipped:
            zero = "Some attention weights on an edge of the mask are zero in this arithmetic"
            found.append(f"{zero}: the variance of their scores is at least what is shown.")
        return found

    def head_rows(self) -> list[Row]:
        """Of each head, and of all heads of a component together (head None): means over samples."""
        rows, together = [], dict[tuple[int, str, str], list[list[float]]]()
        for ((block, component, head), name), values in self.values.items():
            rows.append(_row(block, component, head, name, values))
            together.setdefault((block, component, name), []).append(values)
        rows += [
            _row(block, component, None, name, [_mean(of_one) for of_one in zip(*values, strict=True)])
            for (block, component, name), values in together.items()
        ]
        found = [row for row in rows if row["count"]]
        return sorted(found, key=lambda row: (row["block"], row["component"], row["head"] or 0))

    def sink_rows(self, text: Callable[[int], str]) -> list[Row]:
        return [
            {
                "component": component, "block": block, "head": head, "position": position, "token": text(token),
                "samples": len(values), "attention": statistics.fmean(values),
            }
            for ((block, component, head), position, token), values in sorted(self.sinks.items())
        ]  # fmt: skip

    def mask_rows(self) -> list[Row]:
        """The graph of the longest sample; means over samples of the rest, the smallest weight of all."""
        rows = []
        for block, found in sorted(self.masks.items()):
            longest = max(found, key=lambda row: row["tokens"])
            row = longest | {"block": block, "least_weight": min(one["least_weight"] for one in found)}
            for name in ("averaged", "product", "paths", "bound"):
                values = [one.get(name) for one in found]
                row[name] = None if self.why or None in values else _mean(values)  # type: ignore[arg-type]
            known = row["bound"] is not None
            row["vacuous"] = row["bound"] > VACUOUS if known else None
            row["reason"] = (
                (row.get("reason") or f"it promises {row['bound']:.4g} or less") if row["vacuous"] else ""
            )
            rows.append(row)
        return rows


def _graph(seen: Tensor, known: list[tuple[Tensor, MaskGraph]]) -> MaskGraph:
    """Blocks have few masks: each is looked at once a sample."""
    for other, graph in known:
        if torch.equal(seen, other):
            return graph
    known.append((seen, MaskGraph.of(seen)))
    return known[-1][1]


def _graph_row(graph: MaskGraph, least: float) -> Row:
    return {
        "tokens": graph.tokens, "edges": graph.edges, "centers": graph.centers, "radius": graph.radius,
        "self_loops": graph.loops, "least_weight": least,
    }  # fmt: skip


def _product_row(product: _Product, averaged: Tensor, common: MaskGraph) -> dict[str, Any]:
    least = product.weight()
    product.bound = min(product.bound, common.bound(least, product.blocks))
    return {
        "averaged": float(metrics.dobrushin(averaged[None, None])),
        "product": float(metrics.dobrushin(product.deviation[None, None])),
        "paths": product.paths,
        "bound": product.bound,
        "reason": common.why_nothing(least, product.blocks),
    }


def _row(block: int, component: str, head: int | None, name: str, values: list[float]) -> Row:
    known = [value for value in values if math.isfinite(value)]
    std = statistics.stdev(known) if len(known) > 1 else math.nan
    mean = statistics.fmean(known) if known else math.nan
    return {
        "component": component, "block": block, "head": head, "metric": name, "mean": mean, "std": std,
        "count": len(known),
    }  # fmt: skip


def _mean(values: list[float] | tuple[float, ...]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.fmean(known) if known else math.nan
