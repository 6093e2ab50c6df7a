"""Attach: find the structure of a model and prove it on a small batch, or refuse.

What is proved, in order: (1) observing and editing with every gate at 1 leaves the output bitwise
as it was; (2) with every branch off each block is the identity, or its own norms applied to its
input; (3) with every branch and skip off a block's output no longer depends on its input, so no
path was missed; (4) with the skips off the branch alone goes on; (5) which branches move information
between tokens, by perturbing every other token. (2) to (5) replay single blocks on the inputs that they
got, so that all of it costs less than ten plain forward passes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rc_probe.hooks.edits.attention_interface import implementation_name
from rc_probe.hooks.edits.model_state import eager, full_precision, measuring, proving, switches
from rc_probe.hooks.proofs.attention_routing import gated_pass
from rc_probe.hooks.proofs.block_proofs import prove_block
from rc_probe.hooks.proofs.constant_branches import with_kinds
from rc_probe.hooks.proofs.replay import Replay, everywhere
from rc_probe.hooks.proofs.streams_side_by_side import prove_streams
from rc_probe.hooks.structure.example_inputs import (
    batch_size,
    example_inputs,
    keep_example,
    signature,
    small,
    with_no_cache,
)
from rc_probe.hooks.structure.refusals import past_hooks
from rc_probe.hooks.structure.side_by_side import UnclearAxesError, mixed_streams
from rc_probe.hooks.structure.stacks import read_stacks
from rc_probe.hooks.structure.structure import REPORT, Block, Candidate, Structure
from rc_probe.hooks.structure.tape import Tape, walk
from rc_probe.hooks.structure.unwrap import check_module

from .errors import RcProbeError, reason
from .undo import undoing

_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, Structure]] = weakref.WeakKeyDictionary()


def find_structure(
    model: nn.Module,
    inputs: dict[str, Any] | None = None,
    *,
    stack: str | None = None,
    blocks: str | None = None,
    several: bool = False,
) -> Structure:
    """The proved structure of one stack of `model`. Runs once per model, form of input and choice.

    `inputs` are keyword arguments of a forward pass with at least two sequences or images; without
    them random ones are made from the model's config. `stack` is the name of a stack or a part of it
    (`encoder`, `vision`); without it the last one that can be proved is taken, which in an
    encoder-decoder is the decoder. `blocks` names the blocks by hand (`encoder.layer.*`). `several` takes stacks, too, whose
    blocks hand on several streams side by side: these can be measured, but have no junctions.

    Raises RcProbeError, naming the block and what did not match, when anything cannot be proved.
    """
    _check_call(model, inputs, stack, blocks)
    refuse_mps(model)
    given = example_inputs(model) if inputs is None else inputs
    structure = _once(model, given, stack, blocks, several=True)
    return structure if several or not structure.mixed else _once(model, given, stack, blocks, several=False)


def _once(
    model: nn.Module, given: dict[str, Any], stack: str | None, blocks: str | None, *, several: bool
) -> Structure:
    key = signature(given), switches(model), implementation_name(model), stack, blocks, several
    known = _known.setdefault(model, {})
    if key not in known:
        with proving(), measuring(model), full_precision(model), eager():
            known[key] = _attach(model, given, stack, blocks, several=several)
    return known[key]


def _check_call(model: Any, inputs: Any, stack: Any, blocks: Any) -> None:
    """RcProbeError for arguments that are not what they should be."""
    check_module(model)
    if inputs is not None and not isinstance(inputs, Mapping):
        todo = "Give the keyword arguments of a forward pass, a dict of tensors"
        raise RcProbeError(f"{type(inputs).__name__} are no inputs", where="inputs", todo=todo)
    for name, value in (("stack", stack), ("blocks", blocks)):
        if value is not None and not isinstance(value, str):
            raise RcProbeError(f"{value!r:.80} is not a text", where=name, todo="Give a name")


def refuse_mps(model: nn.Module) -> None:
    """Raises RcProbeError where a part of the model is on Apple's GPU."""
    if any(parameter.device.type == "mps" for parameter in model.parameters()):
        what = "it is on mps, which has no float64, and rc-probe sums its statistics in float64"
        raise RcProbeError(what, where=type(model).__name__, todo="Move it first: model.to('cpu')")


def _first_pass(
    model: nn.Module, given: dict[str, Any], apart: bool
) -> tuple[Callable[[], list[Tensor]], dict[str, Any], list[Tensor]]:
    """A pass that the model can make, on the smallest inputs that it runs with; these, and what it returns for them.

    A few samples without a cache, where it can: some models fold several rows into a sample, and a few
    have no cache to switch off. On all that is given where the model sets itself to something else for less of it
    (BigBird). A head that cannot read several samples (classifiers without a pad token) is left out.
    """
    failed: list[Exception] = []
    for runs in dict.fromkeys([model, getattr(model, "base_model", model)]):
        for inputs in (small(given, apart=apart), given):
            for tried in (with_no_cache(model, inputs), inputs):
                try:
                    with measuring(model):
                        before = switches(model, (str,))
                        output = _tensors(runs(**tried))
                        changed = switches(model, (str,)) != before
                except Exception as error:  # the model's own, of any kind
                    failed.append(error)
                    continue
                if not changed or inputs is given:
                    return partial(_run, runs, tried), tried, output
    todo = "Check the inputs and the dtype; some models run in float32 only"
    what = f"its forward pass fails ({reason(failed[0])})"
    raise RcProbeError(what, where=type(model).__name__, todo=todo) from failed[0]


def _attach(
    model: nn.Module,
    given: dict[str, Any],
    stack: str | None,
    blocks: str | None,
    *,
    several: bool,
    apart: bool = False,
) -> Structure:
    run, inputs, plain = _first_pass(model, given, apart)
    tape = Tape(model)
    with undoing(tape.close), tape:
        observed = run()
    finite = not any(t.isnan().any() for t in plain)
    _refuse_unless(finite, model, "its output holds NaN", "Try --dtype float32, and check the weights")
    _refuse_unless(
        _same(plain, observed) and _same(plain, run()),
        model,
        "its output changes from run to run",
        "Switch off its randomness",
    )
    try:
        found = {s.name: s for s in read_stacks(tape, model, batch_size(inputs), blocks)}
    except UnclearAxesError:
        if apart:
            raise
        return _attach(model, given, stack, blocks, several=several, apart=True)
    wanted = [named(list(found), stack, type(model).__name__)] if stack else reversed(found)
    refused: list[RcProbeError] = []
    for candidate in (found[name] for name in wanted):
        try:
            if candidate.mixed and not several:
                raise mixed_streams(candidate.streams, model)
            structure = _prove(candidate, run, plain)
            structure = replace(structure, refused=(*candidate.refused, *map(str, refused)))
            keep_example(structure, inputs)
            return structure
        except RcProbeError as error:
            refused.append(error)
    raise past_hooks(tape) or refused[0]


def _run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    return _tensors(model(**inputs))


def named(names: list[str], stack: str, where: str) -> str:
    """The name that is `stack`, or the only one in which it occurs."""
    near = [name for name in names if name == stack] or [name for name in names if stack in name]
    if len(near) != 1:
        what = f"{'more than one stack' if near else 'no stack'} is named {stack!r}"
        raise RcProbeError(what, where=where, todo=f"Its stacks are {', '.join(map(repr, names))}")
    return near[0]


def _prove(candidate: Candidate, run: Callable[[], list[Tensor]], plain: list[Tensor]) -> Structure:
    if candidate.mixed:
        return prove_streams(candidate, lambda: _same(plain, run()))
    replay = Replay(candidate)
    ones = everywhere(candidate.blocks, lambda x: x)
    with replay:
        candidate, gated = gated_pass(candidate, ones, run, lambda out: _same(plain, out))
    _refuse_unless(
        _same(plain, gated), candidate.model, "its output changes although every gate is 1", REPORT
    )
    replay = Replay(candidate, replay.calls)
    blocks = with_kinds(candidate, [prove_block(candidate, block, replay) for block in candidate.blocks])
    return Structure(
        **vars(candidate) | {"blocks": blocks, "proved": tuple(_proofs(blocks, candidate.unowned))}
    )


def _proofs(blocks: Sequence[Block], unowned: str) -> Iterator[str]:
    """What was proved, in words."""
    scaled = any(block.scaled for block in blocks)
    called = any(n.turn < 0 for b in blocks for j in b.junctions for n in j.norms)
    nested = sorted({b.kind for block in blocks for b in block.branches if b.inner})
    yield "with every gate at 1 the output is bitwise the plain output"
    if scaled:
        yield "with every branch off each block is a fixed scaling of its input, or its norms of that"
    else:
        unchecked = " (not checked where a norm is called as a function)" if called else ""
        yield f"with every branch off each block is the identity or its norms{unchecked}"
    yield "with everything off a block's output no longer depends on its input"
    yield "with a skip off the branch alone goes on"
    yield "kinds of branches confirmed by perturbing every other token"
    if constant := [f"{b.index + 1} ({r.kind})" for b in blocks for r in b.branches if r.constant]:
        same = "add the same to every token (zeros, or a bias): their kinds are those of blocks built alike"
        yield f"branches of blocks {', '.join(constant)} {same}"
    if unowned:
        yield f"attention operations are intercepted one by one, and not by the library's interface: {unowned}"
    if nested:
        yield f"proved at the outermost level: inside {' and '.join(nested)} branches there are further skips"


def _tensors(output: Any) -> list[Tensor]:
    return [t for _, t in walk(output) if t.is_floating_point()]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _refuse_unless(holds: bool, model: nn.Module, what: str, todo: str) -> None:
    if not holds:
        raise RcProbeError(what, where=type(model).__name__, todo=todo)
