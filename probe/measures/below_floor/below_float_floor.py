"""The tables `recursion` and `bounds`: a model's pure attention variant, in split arithmetic below the float floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rc_probe.data.batches import Batch
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.edits.stream_taps import Tap, batch_first, run_stopped
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.proofs.replay import Replay, token_axis
from rc_probe.hooks.split.rules import Split
from rc_probe.hooks.structure.example_inputs import with_no_cache
from rc_probe.hooks.structure.structure import Block, Structure
from rc_probe.interventions.paper import paper_variants
from rc_probe.measures.variant_passes import stream_pass
from rc_probe.metrics.layer_curves import Curves
from rc_probe.results.tables import Row

from .recursion import recursion
from .theorem_bound import Bounds, attention_branch


def first_sample(batch: Batch) -> Batch:
    """The first sample of a batch, without the padding that the others made."""
    mask = None if batch.mask is None else batch.mask[:1]
    inputs: dict[str, Any] = {
        k: v[:1] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.inputs.items()
    }
    if mask is not None:
        tokens, length = int(mask.sum()), mask.shape[1]
        cut = {
            k: v[:, :tokens] for k, v in inputs.items() if isinstance(v, Tensor) and v.shape[1:2] == (length,)
        }
        inputs |= cut
    return Batch(inputs, None)


@dataclass(frozen=True)
class Below:
    """Rows of the tables `recursion` and `bounds`, and notes on what is not there and why."""

    recursion: list[Row]
    bounds: list[Row]
    notes: list[str]


def below_the_floor(structure: Structure, batch: Batch, weights: str) -> Below:
    """The pure attention variant of the first sample of `batch`, without cancellation.

    Beside each residual stands what the model's own arithmetic gives. A model with an operation that
    split arithmetic has no rule for, or whose result does not agree where both can be compared, gets
    no rows; one that the theorem does not cover gets no bounds. The notes say why.
    """
    sample = first_sample(batch)
    san = paper_variants(structure)[0].edits(structure)
    direct = Curves(["residual"])
    replay = Replay(structure)
    with measuring(structure.model):
        after: dict[int, Tensor] = {}
        with replay, Tap(structure, lambda layer, x: after.update({layer: x}), stop=True):
            run_stopped(lambda: structure.model(**with_no_cache(structure.model, sample.inputs)))
        for block in structure.blocks:
            if not torch.equal(batch_first(replay.stream(block), block), after[block.index]):
                what = f"the stream is changed between blocks {block.index} and {block.index + 1}"
                return Below([], [], [f"Below the float floor, {weights}: {what}"])
        stream_pass(structure, sample.inputs, san, direct.on_stream)
        plain = [row["mean"] for row in direct.rows()]
        first = structure.blocks[0]

        def running(block: Block) -> Callable[[Split], Any]:
            return lambda stream: replay.run(block, stream, san)

        bounds = Bounds(lambda layer: attention_branch(replay, structure.blocks[layer - 1], san))
        try:
            found = recursion(
                [running(block) for block in structure.blocks], replay.stream(first), None, plain,
                axis=token_axis(first) - first.ndim, each=bounds,
            )  # fmt: skip
        except RcProbeError as error:
            return Below([], [], [f"Below the float floor, {weights}: {error}"])
    notes = (
        [f"Recursion below the float floor, {weights}: {found.note[0].lower()}{found.note[1:]}"]
        if found.note
        else []
    )
    if bounds.why:
        notes.append(f"No bound from the theorem, {weights}: {bounds.why}")
    return Below(_named(weights, found.rows), _named(weights, bounds.rows()), notes)


def _named(weights: str, rows: list[Row]) -> list[Row]:
    return [{"weights": weights, **row} for row in rows]
