"""Streaming statistics of each metric at each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import Structure
from rc_probe.registry import METRICS
from rc_probe.results.tables import Row

from .moments import Moments, pack, unpack
from .stream_metrics import measure

Measured = dict[str, tuple[Tensor, Tensor]]  # metric: its values and floors, (batch,)
Kept = dict[tuple[int, str], Moments]
K = TypeVar("K")


@dataclass
class Curves:
    """Streaming statistics of each metric at each layer. Memory does not grow with the samples.

    Rows of fewer than two real tokens are no samples.

    `few` is how many samples, the first of the data, the slow metrics (singular values, solvers) are measured on.
    """

    metrics: Sequence[str]
    few: int = 4
    # by layer and metrics that are summed together: of each metric the value, then its floor
    sums: dict[tuple[int, tuple[str, ...]], Moments] = field(default_factory=dict)
    samples: int = 0  # before the batch that is running
    mask: Tensor | None = None  # of the batch that is running, (batch, tokens)
    noise: dict[int, float] = field(default_factory=dict)  # by layer, where it is measured (see `measure`)
    slow_at: int | None = None  # the layer that the slow metrics are measured at; None: all

    def __post_init__(self) -> None:
        self._seen: Tensor | None = None
        self._counted: Tensor | None = None  # samples (batch,) of the batch that is running; None: all
        self.cheap = [name for name in self.metrics if METRICS[name].cost == "cheap"]
        self.slow = [name for name in self.metrics if METRICS[name].cost != "cheap"]

    def on_stream(self, layer: int, x: Tensor) -> None:
        """Add the stream x (batch, tokens, dim) of one layer."""
        self.add(layer, self.read(layer, x))

    def read(self, layer: int, x: Tensor) -> Measured:
        """What the metrics say about the stream x (batch, tokens, dim), to be added."""
        mask = self.mask
        if mask is not None and mask.shape != x.shape[:2]:
            raise RcProbeError(
                f"the stream of layer {layer} has {x.shape[1]} tokens and the mask {mask.shape[1]}, "
                "so padding cannot be told from text",
                todo="Measure texts one by one: --batch-size 1",
            )
        left = max(self.few - self.samples, 0)
        mask = mask if mask is None else mask.to(x.device)  # layers may lie on several devices
        noise = self.noise.get(layer, 0.0)
        found = measure(x, mask, self.cheap, noise)
        if self.slow and left and self.slow_at in (None, layer):
            found |= measure(x[:left], None if mask is None else mask[:left], self.slow, noise)
        return found

    def _see(self, mask: Tensor | None) -> None:
        """Rows of fewer than two tokens are no samples. Only on the CPU, where nothing waits, is it seen whether there are any."""
        if mask is not self._seen:
            enough = None if mask is None else mask.sum(1) >= 2
            all_count = enough is None or (enough.device.type == "cpu" and bool(enough.all()))
            self._seen, self._counted = mask, None if all_count else enough

    def add(self, layer: int, measured: Measured) -> None:
        self._see(self.mask)
        for names in (self.cheap, self.slow):  # which are of as many samples
            both = [x for name in names if name in measured for x in measured[name]]
            if both:
                stacked = torch.stack(both).T  # (batch, 2 · metrics)
                counted = self._counted if self._counted is None else self._counted[: len(stacked)]
                key = (layer, tuple(names))
                if key not in self.sums:
                    self.sums[key] = Moments(stacked.device)
                self.sums[key].add(stacked, counted)

    def each(self) -> Kept:
        """The statistics (2,) of each metric at each layer: of the value, and of its floor."""
        return {
            (layer, name): moments.part(slice(2 * i, 2 * i + 2))
            for (layer, names), moments in self.sums.items()
            for i, name in enumerate(names)
        }

    @property
    def values(self) -> Kept:
        return {key: moments.part(0) for key, moments in self.each().items()}

    @property
    def floors(self) -> Kept:
        return {key: moments.part(1) for key, moments in self.each().items()}

    def merge(self, other: Curves) -> None:
        mine = self.each()
        for key, moments in other.each().items():
            mine.setdefault(key, Moments()).merge(moments)
        self.sums = by_metric(mine)

    def rows(self, **first: Any) -> list[Row]:
        """A row for each metric and layer, in that order; `first` says what else each row has, such as its variant."""
        order, floors = {name: i for i, name in enumerate(METRICS)}, self.floors
        return [
            {
                **first, "layer": layer, "metric": name,
                "mean": float(m.mean), "std": float(m.std) if m.count > 1 else None, "count": int(m.count),
                "floor": float(floors[layer, name].mean),
            }
            for (layer, name), m in sorted(self.values.items(), key=lambda kv: (order[kv[0][1]], kv[0][0]))
        ]  # fmt: skip


def by_metric(each: Kept) -> dict[tuple[int, tuple[str, ...]], Moments]:
    """What `each` gives, as sums of one metric."""
    return {(layer, (name,)): moments for (layer, name), moments in each.items()}


def gather_curves(curves: dict[K, Curves], gather: Callable[[Any], list[Any]]) -> dict[K, Curves]:
    """The statistics of all processes together, on the host; `gather` is that of a World."""
    packs = gather({name: pack(mine.each()) for name, mine in curves.items()})
    return {
        name: Curves(mine.metrics, mine.few, by_metric(unpack(p[name] for p in packs)))
        for name, mine in curves.items()
    }


def check_finite(structure: Structure, curves: dict[str, Curves]) -> None:
    """Refuse a run whose unablated model gave NaN or infinity, as overflow in half precision does."""
    plain = curves.get("transformer")
    for (layer, name), moments in (plain.values if plain else {}).items():
        if (
            METRICS[name].cost == "cheap"
            and not METRICS[name].may_be_nan
            and not torch.isfinite(torch.as_tensor(moments.mean))
        ):
            raise structure.error(
                structure.blocks[max(layer - 1, 0)],
                f"the stream of layer {layer} holds NaN or infinity",
                "Try --dtype float32, and check the model and the data",
            )
