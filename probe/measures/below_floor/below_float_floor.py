"""The tables `recursion` and `bounds`: a model's pure attention variant, in split arithmetic below the float floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rc_probe.budget import AT_MOST, DOUBLE, Shape, first_that_fits
from rc_probe.data.batches import Batch, part_of
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.edits.stream_taps import Tap, batch_first, run_stopped
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.proofs.replay import Replay, token_axis
from rc_probe.hooks.split.rules import Split
from rc_probe.hooks.structure.example_inputs import with_no_cache
from rc_probe.hooks.structure.structure import Block, Structure, decodes
from rc_probe.interventions.paper import paper_variants
from rc_probe.measures.variant_passes import stream_pass
from rc_probe.metrics.layer_curves import Curves
from rc_probe.results.tables import Row

from .corollary import corollary
from .layer_weights import attention_branch
from .recursion import recursion
from .theorem_bound import Bounds

DEARER = 8  # plain passes of one sample that its recursion costs


@dataclass(frozen=True)
class Chosen:
    """How much is measured: the first `tokens` of the first sample (None: all), bounds or not."""

    tokens: int | None = None
    bounds: bool = True


def affordable(shape: Shape, *, cut: bool, bounds: bool) -> Chosen | None:
    """The first within the limits of rc_probe.budget: all tokens, half of them, a quarter …; with bounds, without.

    cut: whether the first tokens of a sample can be had alone
    """
    tokens = shape.halved() if cut else [shape.tokens]
    choices = (
        Chosen(t, with_bounds) for t in tokens for with_bounds in ((True, False) if bounds else (False,))
    )
    found = first_that_fits(choices, shape, lambda one: _work(shape, one), lambda one: _memory(shape, one))
    return replace(found, tokens=None) if found and found.tokens == shape.tokens else found


def said(chosen: Chosen, asked: bool) -> list[str]:
    """A note where something was cut; asked: whether bounds were asked for."""
    parts = [f"the first {chosen.tokens} tokens of the sample"] if chosen.tokens else []
    parts += ["no bounds"] if asked and not chosen.bounds else []
    return (
        [f"Below the float floor: {', '.join(parts)}, so that it costs no more than {AT_MOST}."]
        if parts
        else []
    )


def _work(shape: Shape, chosen: Chosen) -> float:
    """Bounds push as many unit vectors as the stream is wide through each layer, take its patterns apart, and multiply the two
    maps of its MLP, four times as wide, with and without their signs."""
    tokens, dim = chosen.tokens or shape.tokens, float(shape.dim)
    each = DOUBLE * (16 * dim**3 + 100 * dim * tokens**2) if chosen.bounds else 0
    return DEARER * shape.plain(tokens) + shape.blocks * each


def _memory(shape: Shape, chosen: Chosen) -> float:
    """Eight tables of scores in float64; for bounds four of the width of the stream."""
    tables = 64.0 * max(shape.heads, default=0) * (chosen.tokens or shape.tokens) ** 2
    return tables + (32.0 * shape.dim**2 if chosen.bounds else 0)


def first_sample(batch: Batch, tokens: int | None = None) -> Batch:
    """The first sample of a batch, or its first tokens, without the padding that the others made."""
    real = None if batch.mask is None else int(batch.mask[0].sum())
    most = min((n for n in (real, tokens) if n is not None), default=None)
    return replace(part_of(batch, slice(0, 1), most), mask=None)


@dataclass(frozen=True)
class Below:
    """Rows of the tables `recursion`, `bounds` and `corollary`, and notes on what is not there and why."""

    recursion: list[Row]
    bounds: list[Row]
    notes: list[str]
    corollary: list[Row] = field(default_factory=list)


def below_the_floor(structure: Structure, batch: Batch, weights: str, chosen: Chosen | None = None) -> Below:
    """The pure attention variant of the first sample of `batch`, without cancellation.

    Beside each residual stands what the model's own arithmetic gives. A model with an operation that
    split arithmetic has no rule for, or whose result does not agree where both can be compared, gets
    no rows; one that the theorem does not cover gets no bounds. The notes say why.
    """
    chosen = chosen or Chosen()
    if (why := _not_pure(structure)) is not None:
        return Below([], [], [f"Pure attention below the float floor was not measured, {weights}: {why}"])
    sample = first_sample(batch, chosen.tokens)
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
                axis=token_axis(first) - first.ndim, each=bounds if chosen.bounds else None,
            )  # fmt: skip
        except RcProbeError as error:
            return Below([], [], [f"Below the float floor, {weights}: {error}"])
        with_mlp = None
        if chosen.bounds:
            variant = paper_variants(structure)[1].edits(structure)
            residuals = [row["residual"] for row in found.rows]
            with_mlp = corollary(
                structure, replay, variant, [] if bounds.why else bounds.heads, residuals, bounds.why
            )
    notes = (
        [f"Recursion below the float floor, {weights}: {found.note[0].lower()}{found.note[1:]}"]
        if found.note
        else []
    )
    if chosen.bounds and bounds.why:
        notes.append(f"No bound from the theorem, {weights}: {bounds.why}")
    if with_mlp is None:
        return Below(_named(weights, found.rows), _named(weights, bounds.rows()), notes)
    notes += [f"{note}, {weights}" for note in with_mlp.notes]
    return Below(
        _named(weights, found.rows), _named(weights, bounds.rows()), notes, _named(weights, with_mlp.rows)
    )


def _not_pure(structure: Structure) -> str | None:
    """Why there is no network of pure attention to follow, where there is none."""
    if structure.streams > 1:
        return f"its blocks hand on {structure.streams} streams side by side, and it is about one"
    if decodes(structure):
        return (
            "the blocks of this decoder add what they read from the encoder, too (cross-attention), and it is about attention to "
            "the tokens of one stream. --stack encoder measures the encoder"
        )
    return None


def _named(weights: str, rows: list[Row]) -> list[Row]:
    return [{"weights": weights, **row} for row in rows]
