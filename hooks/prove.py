"""Attach: find the structure of a model and prove it on a small batch, or refuse.

What is proved, in order: (1) observing and editing with every gate at 1 leaves the output bitwise
as it was; (2) with every branch off each block is the identity, or its own norms applied to its
input; (3) with every branch and skip off a block's output no longer depends on its input, so no
path was missed; (4) with the skips off the branch alone goes on; (5) which branches move information
between tokens, by perturbing one token. (2) to (5) replay single blocks on the inputs that they
got, so that all of it costs less than ten plain forward passes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace as replace_field
from typing import Any

import torch
from torch import Tensor, nn

from .attention import gated_pass
from .blockmode import Function
from .edits import Edits, zero
from .errors import RcProbeError
from .find import read_stacks
from .inputs import batch_size, example_inputs, signature, small, with_no_cache
from .interface import implementation_name
from .replay import Replay, all_off, noise_like, rounding, token_axis, tolerance
from .scaling import prove_scaling
from .state import eager, measuring, switches
from .structure import INTERFACE, REPORT, AttentionOp, Block, Branch, NormAfter, Structure
from .tape import Tape, walk

_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, Structure]] = weakref.WeakKeyDictionary()


def find_structure(
    model: nn.Module,
    inputs: dict[str, Any] | None = None,
    *,
    stack: str | None = None,
    blocks: str | None = None,
) -> Structure:
    """The proved structure of one stack of `model`. Runs once per model, form of input and choice.

    `inputs` are keyword arguments of a forward pass with at least two sequences or images; without
    them random ones are made from the model's config. `stack` is the name of a stack or a part of it
    (`encoder`, `vision`); without it the last one that can be proved is taken, which in an
    encoder-decoder is the decoder. `blocks` names the blocks by hand (`encoder.layer.*`).

    Raises RcProbeError, naming the block and what did not match, when anything cannot be proved.
    """
    given = example_inputs(model) if inputs is None else inputs
    key = signature(given), switches(model), implementation_name(model), stack, blocks
    known = _known.setdefault(model, {})
    if key not in known:
        with measuring(model), eager():
            known[key] = _attach(model, given, stack, blocks)
    return known[key]


def _first_pass(model: nn.Module, given: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """The smallest inputs that the model runs with, and what it returns for them.

    A few samples without a cache, where it can: some models fold several rows into a sample, and a few
    have no cache to switch off.
    """
    failed: list[Exception] = []
    for inputs in (small(given), given):
        for tried in (with_no_cache(model, inputs), inputs):
            try:
                return tried, _tensors(model(**tried))
            except Exception as error:  # the model's own, of any kind
                failed.append(error)
    text = (str(failed[0]).strip().splitlines() or [type(failed[0]).__name__])[0]
    todo = "Check the inputs and the dtype; some models run in float32 only"
    raise RcProbeError(f"its forward pass fails ({text})", where=type(model).__name__, todo=todo) from failed[
        0
    ]


def _attach(model: nn.Module, given: dict[str, Any], stack: str | None, blocks: str | None) -> Structure:
    inputs, plain = _first_pass(model, given)
    with Tape(model) as tape:
        observed = _tensors(model(**inputs))
    finite = not any(t.isnan().any() for t in plain)
    _refuse_unless(finite, model, "its output holds NaN", "Try --dtype float32, and check the weights")
    _refuse_unless(
        _same(plain, observed), model, "its output changes from run to run", "Switch off its randomness"
    )
    found = {s.name: s for s in read_stacks(tape, model, batch_size(inputs), blocks)}
    wanted = [named(list(found), stack, type(model).__name__)] if stack else reversed(found)
    refused: list[RcProbeError] = []
    for structure in (found[name] for name in wanted):
        try:
            _prove(structure, lambda: _tensors(model(**inputs)), plain)
        except RcProbeError as error:
            refused.append(error)
            continue
        structure.refused += tuple(str(error) for error in refused)
        return structure
    raise refused[0]


def named(names: list[str], stack: str, where: str) -> str:
    """The name that is `stack`, or the only one in which it occurs."""
    near = [name for name in names if name == stack] or [name for name in names if stack in name]
    if len(near) != 1:
        what = f"{'more than one stack' if near else 'no stack'} is named {stack!r}"
        raise RcProbeError(what, where=where, todo=f"Its stacks are {', '.join(map(repr, names))}")
    return near[0]


def _prove(structure: Structure, run: Callable[[], list[Tensor]], plain: list[Tensor]) -> None:
    replay = Replay(structure)
    with replay:
        gated = gated_pass(structure, _everywhere(structure, lambda x: x), run, lambda out: _same(plain, out))
    _refuse_unless(
        _same(plain, gated), structure.model, "its output changes although every gate is 1", REPORT
    )
    structure.proved.append("with every gate at 1 the output is bitwise the plain output")
    for block in structure.blocks:
        _prove_block(structure, block, replay)
    called = any(n.turn < 0 for b in structure.blocks for j in b.junctions for n in j.norms)
    structure.proved += [
        "with every branch off each block is the identity or its norms"
        + (" (not checked where a norm is called as a function)" if called else ""),
        "with everything off a block's output no longer depends on its input",
        "with a skip off the branch alone goes on",
        "kinds of branches confirmed by perturbing every other token",
    ]
    if any(block.scaled for block in structure.blocks):
        structure.proved[1] = (
            "with every branch off each block is a fixed scaling of its input, or its norms of that"
        )
    if nested := sorted({b.kind for block in structure.blocks for b in block.branches if b.inner}):
        structure.proved.append(
            f"proved at the outermost level: inside {' and '.join(nested)} branches there are further skips"
        )


def _prove_block(structure: Structure, block: Block, blocks: Replay) -> None:
    if block.index not in blocks.calls:
        raise structure.error(
            block, "its hooks did not fire", f"Call the model, not its forward method. {REPORT}"
        )
    x = blocks.stream(block)
    if not torch.isfinite(x).all():
        raise structure.error(
            block, "the stream that enters it holds NaN or infinity", "Check the model's weights"
        )
    other = noise_like(x)

    clean: dict[int, Tensor] = {}
    moved: dict[int, Tensor] = {}
    clean_ops: dict[AttentionOp, Tensor] = {}
    moved_ops: dict[AttentionOp, Tensor] = {}
    out = blocks.run(block, x, _branches_off(block, clean, clean_ops))
    block.scaled = not _is_identity(structure, block, x, out)
    if block.scaled:
        prove_scaling(blocks, block, x)
    blocks.run(block, _every_other_like_the_next(x, block), _branches_off(block, moved, moved_ops))
    for number, branch in enumerate(block.branches):
        branch.ops = tuple(_proved_heads(op, block, x, clean_ops, moved_ops) for op in branch.ops)
        if torch.equal(clean[number], moved[number]):
            raise structure.error(
                block,
                "one of its branches does not depend on what enters it",
                f"This block cannot be probed. {REPORT}",
            )
        if _leaks(block, clean[number], moved[number], x.shape):
            raise structure.error(
                block,
                "what it adds to one sample of a batch depends on the others",
                "The first axis of the inputs must count samples (wrap a model that takes time first); "
                "int8 that shares one scale over the batch cannot be probed: use one scale a token (torchao)",
            )
        branch.kind = _kind(branch, block, clean[number], moved[number], x.shape)

    off = all_off(block)
    if not torch.equal(blocks.run(block, x, off), blocks.run(block, other, off)):
        raise structure.error(
            block,
            "its output still depends on its input with every skip and branch found switched off "
            f"({', '.join(j.where for j in block.junctions)}): a path was missed",
            f"This block cannot be probed exactly. {REPORT}",
        )
    if not block.scaled:
        _prove_skips(structure, block, blocks, x)


def _normed(structure: Structure, block: Block, norm: NormAfter, x: Tensor) -> Tensor:
    try:
        out: Tensor = structure.model.get_submodule(norm.name)(x)
    except Exception as error:  # the module's own, of any kind
        what = f"its {norm.name} cannot be applied to the stream alone ({type(error).__name__})"
        raise structure.error(block, what, f"This block cannot be probed. {REPORT}") from error
    return out


def _is_identity(structure: Structure, block: Block, x: Tensor, out: Tensor) -> bool:
    expected = x
    for norm in (n for j in block.junctions for n in j.norms):
        if norm.turn < 0:
            return True  # a norm without a module cannot be applied from here; (3) and (4) still hold
        expected = _normed(structure, block, norm, expected)
    return torch.equal(expected, out)


def _prove_skips(structure: Structure, block: Block, blocks: Replay, x: Tensor) -> None:
    """With all skips off, what goes on after each junction is the sum of its branches (through the norms).

    What goes on after a junction is seen as the next one's skip operand, before it is removed.
    """
    kept: list[list[Tensor]] = [[] for _ in block.junctions]
    skips: list[Tensor] = []
    edits = Edits()

    def keep(into: list[Tensor], then: Function) -> Function:
        def take(value: Tensor) -> Tensor:
            into.append(value.clone())
            return then(value)

        return take

    for junction, branches in zip(block.junctions, kept, strict=True):
        edits.at(junction.skip, keep(skips, zero))
        for branch in junction.branches:
            edits.at(branch.site, keep(branches, lambda value: value))
    out = blocks.run(block, x, edits)
    for junction, branches, after in zip(block.junctions, kept, [*skips[1:], out], strict=True):
        if any(norm.turn < 0 for norm in junction.norms):
            continue
        expected = sum(branches[1:], branches[0]).reshape(after.shape)
        for norm in junction.norms:
            expected = _normed(structure, block, norm, expected)
        expected = expected.to(after.dtype)  # some add their branches to a stream of higher precision
        if not torch.allclose(
            expected, after, rtol=tolerance(x), atol=tolerance(x) * float(after.abs().amax())
        ):
            raise structure.error(
                block,
                f"with the skip at {junction.where} off, not the branch alone goes on",
                f"This block cannot be probed exactly. {REPORT}",
            )


def _kind(branch: Branch, block: Block, clean: Tensor, moved: Tensor, block_shape: torch.Size) -> str:
    axis = token_axis(block)
    if block_shape[axis] == 1:  # a last stage that is pooled to one token: nothing can be seen to move
        mixes = bool(branch.ops) or branch.has_product
    else:
        others = torch.arange(1, block_shape[axis], 2, device=clean.device)
        mixes = _changed(block, clean, moved, block_shape, axis, others)
    if mixes:
        return "attention" if branch.ops or branch.has_product else "mixer"
    return "cross" if branch.outside else "mlp"


def _leaks(block: Block, clean: Tensor, moved: Tensor, block_shape: torch.Size) -> bool:
    """Whether a change of the first sample reaches others."""
    if block.batch_axis is None:
        return False
    others = torch.arange(1, block_shape[block.batch_axis], device=clean.device)
    return _changed(block, clean, moved, block_shape, block.batch_axis, others)


def _changed(
    block: Block, clean: Tensor, moved: Tensor, shape: torch.Size, axis: int, chosen: Tensor
) -> bool:
    """Whether any of the chosen rows of an axis differs by more than rounding, next to its own size."""
    before, after = (t.reshape(shape).index_select(axis, chosen) for t in (clean, moved))
    features = block.feature_axis
    change, size = (after - before).abs().amax(features), before.abs().amax(features)
    return bool((change > rounding(clean) * size).any())


def _proved_heads(
    op: AttentionOp,
    block: Block,
    x: Tensor,
    clean: dict[AttentionOp, Tensor],
    moved: dict[AttentionOp, Tensor],
) -> AttentionOp:
    """The op, with 0 heads where its layout is not proved to be (batch, heads, tokens, …) or folded.

    Only the first sample was changed, so only the first rows of the batch may differ; and the axis
    after the heads must hold the tokens, in windows or whole.
    """
    before, after = clean.get(op), moved.get(op)
    if before is None or after is None or before.ndim > 4 or op.heads < 1 or block.batch_axis is None:
        return replace_field(op, heads=0)
    if op.via == INTERFACE:
        before, after = before.transpose(1, 2), after.transpose(1, 2)
    samples, tokens = x.shape[block.batch_axis], x.shape[token_axis(block)]
    rows = before.shape[0] // samples  # per sample: windows, or folded heads
    differs = (before != after).flatten(1).any(1)
    windows = rows if before.ndim == 4 else rows // op.heads
    folds = before.ndim == 4 or rows == op.heads
    if differs[rows:].any() or not folds or windows * before.shape[-2] < tokens:
        return replace_field(op, heads=0)
    return op


def _every_other_like_the_next(x: Tensor, block: Block) -> Tensor:
    """Every other token of the first sample becomes nearly its neighbour.

    Every other, as attention may look forward only, backward only, or at few; like the neighbour, as
    a saturated pattern that looks at one token only then has to look at two.
    """
    axis = token_axis(block)
    noisy = x.roll(-1, axis) + 0.3 * noise_like(x)
    tokens: list[Any] = [slice(None)] * x.ndim
    tokens[axis] = slice(None, None, 2)
    if block.batch_axis is not None:
        tokens[block.batch_axis] = slice(0, 1)
    y = x.clone()
    y[tuple(tokens)] = noisy[tuple(tokens)]
    return y


def _branches_off(block: Block, captured: dict[int, Tensor], ops: dict[AttentionOp, Tensor]) -> Edits:
    """Each branch is captured, then removed, so that every branch sees the block's input itself.

    The results of attention operations are captured, too.
    """
    edits = Edits()

    def watching(op: AttentionOp) -> Function:
        def watch(value: Tensor) -> Tensor:
            ops[op] = value.clone()
            return value

        return watch

    for op in (op for branch in block.branches for op in branch.ops):
        edits.at_op(block.index, op, watching(op))

    def taking(number: int) -> Function:
        def take(value: Tensor) -> Tensor:
            captured[number] = value.clone()
            return zero(value)

        return take

    for number, branch in enumerate(block.branches):
        edits.at(branch.site, taking(number))
    return edits


def _everywhere(structure: Structure, function: Function) -> Edits:
    edits = Edits()
    for block in structure.blocks:
        for junction in block.junctions:
            for site in (junction.skip, *(b.site for b in junction.branches)):
                edits.at(site, function)
    return edits


def _tensors(output: Any) -> list[Tensor]:
    return [t for _, t in walk(output) if t.is_floating_point()]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _refuse_unless(holds: bool, model: nn.Module, what: str, todo: str) -> None:
    if not holds:
        raise RcProbeError(what, where=type(model).__name__, todo=todo)
