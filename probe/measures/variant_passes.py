"""Measure: the variants of one model over the same batches, statistics streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rc_probe import engine
from rc_probe.data.batches import Batch
from rc_probe.hooks.edits.edits import Editing, Edits
from rc_probe.hooks.edits.stream_taps import Tap, run_stopped
from rc_probe.hooks.structure.example_inputs import with_no_cache
from rc_probe.hooks.structure.structure import Structure
from rc_probe.interventions.intervention import Variant
from rc_probe.metrics.layer_curves import Curves, Measured
from rc_probe.registry import WHOLE


class CurveReader:
    """A reader of the engine that keeps the curves of each of these variants; what all share is measured once.

    slow_at: the layer that the slow metrics are measured at; None: all
    """

    wants_output = False

    def __init__(
        self, names: Iterable[str], metrics: Sequence[str], few: int, slow_at: int | None = None
    ) -> None:
        self.curves = {name: Curves(metrics, few, slow_at=slow_at) for name in names}
        self._plain: dict[int, Measured] = {}  # of the batch that runs

    def begin(self, batch: Batch) -> None:
        self._plain = {}
        for curves in self.curves.values():
            curves.mask, curves.samples = batch.mask, batch.start

    def stream(self, name: str, layer: int, x: Tensor) -> None:
        if name == WHOLE:
            curves = self.curves.get(WHOLE) or next(iter(self.curves.values()))
            self._plain[layer] = curves.read(layer, x)
            if name in self.curves:
                self.curves[name].add(layer, self._plain[layer])
        elif name in self.curves:
            self.curves[name].on_stream(layer, x)

    def as_plain(self, name: str, layers: range) -> None:
        for layer in layers if name in self.curves else ():
            self.curves[name].add(layer, self._plain[layer])

    def output(self, name: str, output: Any) -> None:
        """Streams are all that is read."""


def measure_variants(
    structure: Structure,
    batches: Iterable[Batch],
    variants: Sequence[Variant],
    metrics: Sequence[str],
    *,
    few: int = 4,
    readers: Iterable[engine.Reader] = (),
    noise: Mapping[str, dict[int, float]] | None = None,
    advance: Callable[[str], None] = lambda name: None,
) -> tuple[dict[str, Curves], list[str]]:
    """The curves of every variant over all batches, and notes. The model is as before.

    `readers` read the same passes. `noise` is by variant and layer (see `Curves`). `advance(variant)` is called after each.
    """
    edits = {variant.name: variant.edits(structure) for variant in variants}
    reader = CurveReader(edits, metrics, few)
    for name, by_layer in (noise or {}).items():
        reader.curves[name].noise = by_layer
    notes = engine.run(structure, batches, edits, [reader, *readers], advance=advance)
    return reader.curves, notes


def stream_pass(
    structure: Structure, inputs: dict[str, Any], edits: Edits, on_stream: Callable[[int, Tensor], None]
) -> None:
    """One whole forward pass with `edits`, the stream of layers 0 … L handed to `on_stream`."""
    with Tap(structure, on_stream, stop=True), Editing(structure, edits):
        run_stopped(lambda: structure.model(**with_no_cache(structure.model, inputs)))
