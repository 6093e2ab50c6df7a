"""Measure: the variants of one model over the same batches, one pass each, statistics streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rc_probe.hooks.edits import Editing, Edits
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.gates import gate_edits
from rc_probe.hooks.inputs import with_no_cache
from rc_probe.hooks.state import measuring
from rc_probe.hooks.structure import Structure
from rc_probe.hooks.taps import Tap, run_stopped

from .batches import Batch
from .metrics import measure
from .moments import Moments, pack, unpack
from .registry import METRICS
from .variants import Variant, span

Row = dict[str, Any]
Measured = dict[str, tuple[Tensor, Tensor]]  # metric: its values and floors, (batch,)


@dataclass
class Curves:
    """Streaming statistics of each metric at each layer. Memory does not grow with the samples.

    `few` is how many samples, the first of the data, the slow metrics (singular values, solvers) are measured on.
    """

    metrics: Sequence[str]
    few: int = 4
    values: dict[tuple[int, str], Moments] = field(default_factory=dict)
    floors: dict[tuple[int, str], Moments] = field(default_factory=dict)
    samples: int = 0  # before the batch that is running
    mask: Tensor | None = None  # of the batch that is running, (batch, tokens)

    def __post_init__(self) -> None:
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
        found = measure(x, mask, self.cheap)
        if self.slow and left:
            found |= measure(x[:left], None if mask is None else mask[:left], self.slow)
        return found

    def add(self, layer: int, measured: Measured) -> None:
        for name, (values, floors) in measured.items():
            self.values.setdefault((layer, name), Moments(values.device)).add(values)
            self.floors.setdefault((layer, name), Moments(values.device)).add(floors)

    def merge(self, other: Curves) -> None:
        for mine, theirs in ((self.values, other.values), (self.floors, other.floors)):
            for key, moments in theirs.items():
                mine.setdefault(key, Moments()).merge(moments)

    def rows(self, weights: str, variant: str) -> list[Row]:
        """Rows of the table `residuals`, by metric, then layer."""
        order = {name: i for i, name in enumerate(METRICS)}
        return [
            {
                "weights": weights, "variant": variant, "layer": layer, "metric": name,
                "mean": float(m.mean), "std": float(m.std) if m.count > 1 else None, "count": int(m.count),
                "floor": float(self.floors[layer, name].mean),
            }
            for (layer, name), m in sorted(self.values.items(), key=lambda kv: (order[kv[0][1]], kv[0][0]))
        ]  # fmt: skip


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


def gather_curves(curves: dict[str, Curves], gather: Callable[[Any], list[Any]]) -> dict[str, Curves]:
    """The statistics of all processes together, on the host; `gather` is that of a World."""
    packs = gather({name: (pack(mine.values), pack(mine.floors)) for name, mine in curves.items()})
    return {
        name: Curves(
            mine.metrics, mine.few, unpack(p[name][0] for p in packs), unpack(p[name][1] for p in packs)
        )
        for name, mine in curves.items()
    }


def check_finite(structure: Structure, curves: dict[str, Curves]) -> None:
    """Refuse a run whose unablated model gave NaN or infinity, as overflow in half precision does."""
    plain = curves.get("transformer")
    for (layer, name), moments in (plain.values if plain else {}).items():
        if (
            METRICS[name].cost == "cheap"
            and name != "cosine_centred"
            and not torch.isfinite(torch.as_tensor(moments.mean))
        ):
            raise structure.error(
                structure.blocks[max(layer - 1, 0)],
                f"the stream of layer {layer} holds NaN or infinity",
                "Try --dtype float32, and check the model and the data",
            )


def ablation_rows(curves: dict[str, Curves], variants: Sequence[Variant], depth: int) -> list[Row]:
    """Rows of the table `ablations`: every variant against the transformer, at the last layer."""
    base = {row["metric"]: row["mean"] for row in curves["transformer"].rows("", "") if row["layer"] == depth}
    rows = []
    for variant in variants:
        if not variant.gates:
            continue
        paper = variant.name in ("SAN", "SAN+MLP", "SAN+skip")
        spans = dict.fromkeys(span(g.blocks) for g in variant.gates)
        heads = [span(g.heads) for g in variant.gates if g.heads]
        component = variant.name if paper else "+".join(dict.fromkeys(g.component for g in variant.gates))
        for row in curves[variant.name].rows("", ""):
            if row["layer"] == depth:
                value, metric = row["mean"], row["metric"]
                rows.append(
                    {
                        "component": component, "layer": "+".join(spans), "head": "+".join(heads) or None,
                        "metric": metric, "value": value, "baseline": base[metric], "change": value - base[metric],
                    }
                )  # fmt: skip
    return rows


def structure_rows(structure: Structure) -> list[Row]:
    """Rows of the table `structure`: what attach found, a row a branch."""
    return [
        {
            "block": block.index + 1, "name": block.name, "call": block.turn + 1, "junction": number + 1,
            "kind": branch.kind, "norm_after": ", ".join(n.name for n in junction.norms) or None,
            "parallel": len(junction.branches) > 1, "heads": (branch.ops[0].heads or None) if branch.ops else None,
            "attention_op": branch.ops[0].via if branch.ops and branch.kind in ("attention", "cross") else None,
        }
        for block in structure.blocks
        for number, junction in enumerate(block.junctions)
        for branch in junction.branches
    ]  # fmt: skip
