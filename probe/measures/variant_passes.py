"""Measure: the variants of one model over the same batches, one pass each, statistics streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from rc_probe.data.batches import Batch
from rc_probe.hooks.edits.edits import Editing, Edits
from rc_probe.hooks.edits.gates import gate_edits
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.edits.stream_taps import Tap, run_stopped
from rc_probe.hooks.structure.example_inputs import with_no_cache
from rc_probe.hooks.structure.structure import Structure

from .curves import Curves
from .variants import Variant


def measure_variants(
    structure: Structure,
    batches: Iterable[Batch],
    variants: Sequence[Variant],
    metrics: Sequence[str],
    *,
    few: int = 4,
    advance: Callable[[str], None] = lambda name: None,
) -> dict[str, Curves]:
    """One forward pass for each batch and variant, stopped after the last layer.

    `advance(variant)` is called after each pass. The model is as before at the end.
    """
    model = structure.model
    edits = {variant.name: gate_edits(structure, variant.gates) for variant in variants}
    curves = {variant.name: Curves(metrics, few) for variant in variants}
    with measuring(model):
        for batch in batches:
            _refuse_packed(structure, batch)
            for name, edit in edits.items():
                curves[name].mask, curves[name].samples = batch.mask, batch.start
                stream_pass(structure, batch.inputs, edit, curves[name].on_stream)
                advance(name)
    return curves


def stream_pass(
    structure: Structure, inputs: dict[str, Any], edits: Edits, on_stream: Callable[[int, Tensor], None]
) -> None:
    """One forward pass with `edits`, the stream of layers 0 … L handed to `on_stream`."""
    with Tap(structure, on_stream, stop=True), Editing(structure, edits):
        run_stopped(lambda: structure.model(**with_no_cache(structure.model, inputs)))


def _refuse_packed(structure: Structure, batch: Batch) -> None:
    size = next(int(t.shape[0]) for t in batch.inputs.values() if isinstance(t, Tensor))
    first = structure.blocks[0]
    if first.batch_axis is None and size > 1:
        raise structure.error(first, "its stream packs all samples into one sequence", "Use --batch-size 1")
