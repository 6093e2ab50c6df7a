"""What is proved of shortcuts: a pass that begins at its first edit gives, bit by bit, what the full pass gives."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rc_probe.hooks.edits.attention_interface import implementation_name
from rc_probe.hooks.edits.edits import Edits, zero
from rc_probe.hooks.edits.model_state import full_precision, measuring, switches
from rc_probe.hooks.edits.passes import Passes
from rc_probe.hooks.edits.recording import NotRecordable, copied, own
from rc_probe.hooks.module_calls import listened_to
from rc_probe.hooks.structure.example_inputs import batch_size, signature, small
from rc_probe.hooks.structure.structure import Block, Structure

_known: weakref.WeakKeyDictionary[Structure, dict[Any, str | None]] = weakref.WeakKeyDictionary()


def shortcut_problem(
    structure: Structure, inputs: dict[str, Any], model: nn.Module | None = None
) -> str | None:
    """Why passes on such inputs have to be full ones; None where shortcuts are proved.

    On a few samples of `inputs`. After the plain pass another one runs, with the samples in another order and without
    the first block's branches, so that whatever a model keeps outside of what its blocks return is no longer that of
    the plain pass. Runs once for a structure, as attaching does: for the model that runs, its settings, form of input.
    """
    if why := _not_meant(structure, inputs):
        return why
    return _once(structure, model, signature(inputs), lambda: _problem(structure, inputs, model))


def _once(
    structure: Structure, model: nn.Module | None, form: Any, prove: Callable[[], str | None]
) -> str | None:
    """What `prove` found for this model, as it is set now, and such a form of input."""
    runs = structure.model if model is None else model
    key = weakref.ref(runs), form, switches(runs), implementation_name(runs)
    known = _known.setdefault(structure, {})
    if key not in known:
        known[key] = prove()
    return known[key]


def _problem(structure: Structure, inputs: dict[str, Any], model: nn.Module | None) -> str | None:
    problem = None
    for tried in (small(inputs), inputs):
        try:
            with measuring(structure.model), full_precision(structure.model):
                return _first_difference(structure, tried, model)
        except Exception as error:  # the model's own, of any kind: some run on whole batches only
            problem = _line(error)
    return problem


def _first_difference(structure: Structure, inputs: dict[str, Any], model: nn.Module | None) -> str | None:
    edits = _real_edits(structure)
    passes = Passes(structure, inputs, edits, model=model, proving=True)
    passes.plain(stop=True)
    Passes(
        structure, _reordered(inputs), base=_branches_off(structure.blocks[0]), model=model, shortcuts=False
    ).plain()
    return next(filter(None, (_difference(passes, each) for each in edits)), None)


def _reordered(inputs: dict[str, Any]) -> dict[str, Any]:
    """The samples of a batch turned by one, where all first axes count samples."""
    batch = batch_size(inputs)
    tensors = [t for t in inputs.values() if isinstance(t, Tensor) and t.ndim]
    if any(t.shape[0] != batch for t in tensors):
        return inputs
    return {k: v.roll(1, 0) if isinstance(v, Tensor) and v.ndim else v for k, v in inputs.items()}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def batch_problem(
    structure: Structure,
    inputs: dict[str, Any],
    model: nn.Module | None = None,
    base: Edits | None = None,
    *,
    stop: bool = False,
) -> str | None:
    """The same on the first samples of a batch, at their whole length, without the last branch of the last block.

    Runs once for such a batch, except under a `base`.
    stop: whether passes end behind the last block, and no output is compared
    """
    first = small(inputs, tokens=None)

    def prove() -> str | None:
        edits = _last_branch_off(structure.blocks[-1])
        try:
            with measuring(structure.model), full_precision(structure.model):
                passes = Passes(structure, first, [edits], base=base, model=model, proving=True)
                passes.plain(stop=True)
                return _difference(passes, edits, stop=stop)
        except Exception as error:  # the model's own, of any kind
            return _line(error)

    shapes = tuple((name, v.shape) for name, v in first.items() if isinstance(v, Tensor))
    return prove() if base is not None else _once(structure, model, (signature(first), shapes, stop), prove)


def _not_meant(structure: Structure, inputs: dict[str, Any]) -> str | None:
    if any(listened_to(structure.module(block)) for block in structure.blocks):
        return "it runs inside of a context that was open before"
    for name, value in inputs.items():
        if own(value) is not value:
            return f"its input {name!r} is a {type(value).__name__}, which passes write into"
    for block in structure.blocks:
        if not block.flow.closed:
            return f"block {block.index + 1} ({block.name}) hands on values that are not in what it returns"
    for parameter in structure.model.parameters():
        if type(parameter).__name__ in {"DTensor", "FlatParameter"} or hasattr(parameter, "ds_id"):
            return "its weights are shared among processes"
    return None


def _real_edits(structure: Structure) -> list[Edits]:
    middle = structure.blocks[structure.depth // 2]
    whole = Edits(identity={middle.index})
    return [_last_branch_off(middle), whole, _branches_off(structure.blocks[-1])]


def _last_branch_off(block: Block) -> Edits:
    edits = Edits()
    edits.at(block.branches[-1].site, zero)
    return edits


def _branches_off(block: Block) -> Edits:
    edits = Edits()
    for branch in block.branches:
        edits.at(branch.site, zero)
    return edits


def _difference(passes: Passes, edits: Edits, *, stop: bool = False) -> str | None:
    """How a short pass differs from the full one with the same edits; None where nothing does."""
    structure, first = passes.structure, min(edits.blocks)
    streams: dict[int, Tensor] = {}
    other: list[int] = []  # layers whose streams differ

    def compare(layer: int, x: Tensor) -> None:
        if layer > first and not torch.equal(streams[layer], x):
            other.append(layer)

    short = passes.edited(edits, lambda layer, x: streams.update({layer: x.clone()}), stop=stop)
    full = Passes(structure, passes.inputs, base=passes.base.then(edits), model=passes.model, proving=True)
    output = full.plain(compare, stop=stop)
    for number in range(passes.first(edits)):
        if not same(full.recorded[number], passes.recorded[number]):
            return f"block {number + 1} returns other numbers than in the pass before"
    if other or not (stop or same(short, output)):
        block = structure.blocks[first]
        return f"a pass that begins at block {block.index + 1} ({block.name}) does not give what the whole one gives"
    return None


def same(a: Any, b: Any) -> bool:
    """Whether the tensors in two outputs are equal bit by bit; what holds other things is not the same."""
    found: tuple[list[Tensor], list[Tensor]] = [], []
    try:
        for value, tensors in zip((a, b), found, strict=True):
            copied(value, lambda x, into=tensors: into.append(x) or x)  # type: ignore[misc]
    except NotRecordable:
        return False
    mine, theirs = found
    return len(mine) == len(theirs) and all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))
