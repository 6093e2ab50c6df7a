"""One engine runs interventions: per batch a plain pass, then for each intervention a pass that begins at its edits.

Sweeps, ablations and the paper's variants are lists of interventions given to it. What is measured is the readers'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rc_probe.data.batches import Batch
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.edits.passes import Passes
from rc_probe.hooks.edits.stream_taps import Tap
from rc_probe.hooks.proofs.shortcuts import batch_problem, shortcut_problem
from rc_probe.hooks.structure.structure import Structure, decodes
from rc_probe.interventions.intervention import Intervention
from rc_probe.registry import WHOLE


class Reader(Protocol):
    """What reads passes, by the name of their intervention. `wants_output`: passes run to their end for it."""

    wants_output: bool

    def begin(self, batch: Batch) -> None:
        """The passes of a new batch follow, the plain one first."""

    def stream(self, name: str, layer: int, x: Tensor) -> None:
        """The stream x (batch, tokens, dim) of a layer, to be read and not kept."""

    def as_plain(self, name: str, layers: range) -> None:
        """Of this pass these layers are those of the plain one; they are not handed on again."""

    def output(self, name: str, output: Any) -> None:
        """What the model returned; for readers that want it."""


class PlainReader:
    """A reader of the plain pass alone: subclasses say what becomes of a stream in `plain`.

    `wants_output`: the plain pass runs to its end for it, the others need not.
    """

    wants_output = False
    batch: Batch  # that is running

    def begin(self, batch: Batch) -> None:
        self.batch = batch

    def plain(self, layer: int, x: Tensor) -> None:
        """The stream x (batch, tokens, dim) of a layer, to be read and not kept."""
        raise NotImplementedError

    def stream(self, name: str, layer: int, x: Tensor) -> None:
        if name == WHOLE:
            self.plain(layer, x)

    def as_plain(self, name: str, layers: range) -> None:
        """What is not run again is not read again."""

    def output(self, name: str, output: Any) -> None:
        """What the plain model returned; for readers that want it."""


def run(
    structure: Structure,
    batches: Iterable[Batch],
    interventions: Mapping[str, Edits],
    readers: Sequence[Reader],
    *,
    base: Edits | None = None,
    model: nn.Module | None = None,
    advance: Callable[[str], None] = lambda name: None,
) -> list[str]:
    """Run every intervention on every batch, and hand what happens to the readers. The model is as before at the end.

    Parameters
    ----------
    interventions: edits by name; those without edits are the plain pass
    base: edits that hold in every pass, the plain one too
    model: whose forward runs, if not the structure's own
    advance: called with the name of each pass that is done

    Returns notes: why passes had to be full ones. Raises RcProbeError where a batch cannot be measured.
    """
    wanting = [reader for reader in readers if reader.wants_output]
    stop = all(isinstance(reader, PlainReader) for reader in wanting)
    edited = [edits for edits in interventions.values() if edits.blocks]
    notes: list[str] = []
    with measuring(structure.model):
        for number, batch in enumerate(batches):
            refuse_packed(structure, batch)
            if number == 0 and edited:
                notes = _prove(structure, batch.inputs, model, base, stop)
            passes = Passes(
                structure, batch.inputs, edited, base=base, model=model, shortcuts=bool(edited) and not notes
            )
            plain = passes.plain(_begun(readers, batch, passes), stop=not wanting)
            for name, edits in {WHOLE: Edits(), **interventions}.items():
                output = plain
                if name != WHOLE:
                    for reader in readers:
                        reader.as_plain(name, range(min(edits.blocks, default=structure.depth) + 1))
                    output = passes.edited(edits, _to(readers, name), stop=stop) if edits.blocks else plain
                for reader in wanting:
                    if name == WHOLE or not isinstance(reader, PlainReader):
                        reader.output(name, output)
                if name in interventions:
                    advance(name)
    return notes


def prepare(
    structure: Structure,
    batches: Iterable[Batch],
    interventions: Iterable[Intervention],
    gather: Callable[[Any], list[Any]] = lambda sums: [sums],
) -> None:
    """Read plain passes over the data for the interventions that need it; none where none does.

    gather: the sums of all processes from those of this one
    """
    waiting: dict[type[Intervention], list[Intervention]] = {}
    for each in interventions:
        if each.on_data:
            waiting.setdefault(type(each), []).append(each)
    if not waiting:
        return
    readings = [kind.reading(structure, given) for kind, given in waiting.items()]
    base = Edits()
    for reading in readings:
        base = base.then(reading.edits)
    run(structure, batches, {}, readings, base=base)
    for reading in readings:
        reading.keep(gather(reading.sums))


def _prove(
    structure: Structure, inputs: dict[str, Any], model: nn.Module | None, base: Edits | None, stop: bool
) -> list[str]:
    """A note where shortcuts do not hold on such inputs."""
    problem = shortcut_problem(structure, inputs, model) or batch_problem(
        structure, inputs, model, base, stop=stop
    )
    return [] if problem is None else [f"Every pass was a full one: {problem}."]


def _to(readers: Sequence[Reader], name: str) -> Callable[[int, Tensor], None]:
    def on_stream(layer: int, x: Tensor) -> None:
        for reader in readers:
            reader.stream(name, layer, x)

    return on_stream


def _begun(readers: Sequence[Reader], batch: Batch, passes: Passes) -> Callable[[int, Tensor], None]:
    """The plain pass to the readers. They begin when its first stream shows which of its tokens are the batch's."""
    hand_on = _to(readers, WHOLE)

    def on_stream(layer: int, x: Tensor) -> None:
        if layer == 0:
            mask = fitted_mask(batch, passes.structure, passes.tap, x)
            for reader in readers:
                reader.begin(batch if mask is batch.mask else replace(batch, mask=mask, before=batch))
        hand_on(layer, x)

    return on_stream


def fitted_mask(batch: Batch, structure: Structure, tap: Tap, x: Tensor) -> Tensor | None:
    """The batch's mask, or where the model adds tokens of its own to a text, that of its stream x of layer 0."""
    side = "decoder_" if decodes(structure) and "decoder_input_ids" in batch.inputs else ""
    ids = batch.inputs.get(f"{side}input_ids")
    if not isinstance(ids, Tensor) or ids.shape[1] >= x.shape[1]:
        return batch.mask
    real = torch.ones(ids.shape[:2], dtype=torch.bool) if batch.mask is None else batch.mask
    return tap.fit(real.to(x.device), x)


def refuse_packed(structure: Structure, batch: Batch) -> None:
    size = next(int(t.shape[0]) for t in batch.inputs.values() if isinstance(t, Tensor))
    first = structure.blocks[0]
    if first.batch_axis is None and size > 1:
        raise structure.error(first, "its stream packs all samples into one sequence", "Use --batch-size 1")
