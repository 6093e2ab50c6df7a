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

from .edits import BlockWatch, Editing, Edits, Function, fetch, replace, zero
from .errors import RcProbeError
from .inputs import batch_size, example_inputs, signature, small, with_no_cache
from .state import eager, measuring, switches
from .structure import REPORT, AttentionOp, Block, Branch, Structure, read_structure
from .tape import Tape, walk

_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, Structure]] = weakref.WeakKeyDictionary()


def find_structure(model: nn.Module, inputs: dict[str, Any] | None = None) -> Structure:
    """The proved structure of `model`. Runs once per model and form of input.

    `inputs` are keyword arguments of a forward pass with at least two sequences or images; without
    them random ones are made from the model's config.

    Raises RcProbeError, naming the block and what did not match, when anything cannot be proved.
    """
    inputs = with_no_cache(model, example_inputs(model) if inputs is None else small(inputs))
    key = (
        signature(inputs),
        switches(model),
        getattr(getattr(model, "config", None), "_attn_implementation", None),
    )
    known = _known.setdefault(model, {})
    if key not in known:
        with measuring(model), eager():
            known[key] = _attach(model, inputs)
    return known[key]


def _attach(model: nn.Module, inputs: dict[str, Any]) -> Structure:
    try:
        plain = _tensors(model(**inputs))
    except Exception as error:  # the model's own, of any kind
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        todo = "Check the inputs and the dtype; some models run in float32 only"
        raise RcProbeError(
            f"its forward pass fails ({text})", where=type(model).__name__, todo=todo
        ) from error
    with Tape(model) as tape:
        observed = _tensors(model(**inputs))
    finite = not any(t.isnan().any() for t in plain)
    _refuse_unless(finite, model, "its output holds NaN", "Try --dtype float32, and check the weights")
    _refuse_unless(
        _same(plain, observed), model, "its output changes from run to run", "Switch off its randomness"
    )
    structure = read_structure(tape, model, batch_size(inputs))
    blocks = Replay(structure)
    with blocks:
        gated = _run_with(structure, _everywhere(structure, lambda x: x), lambda: _tensors(model(**inputs)))
    _refuse_unless(_same(plain, gated), model, "its output changes although every gate is 1", REPORT)
    structure.proved.append("with every gate at 1 the output is bitwise the plain output")
    for block in structure.blocks:
        _prove_block(structure, block, blocks)
    called = any(n.turn < 0 for b in structure.blocks for j in b.junctions for n in j.norms)
    structure.proved += [
        "with every branch off each block is the identity or its norms"
        + (" (not checked where a norm is called as a function)" if called else ""),
        "with everything off a block's output no longer depends on its input",
        "with a skip off the branch alone goes on",
        "kinds of branches confirmed by perturbing one token",
    ]
    return structure


class Replay(BlockWatch):
    """Records what each block call gets in a forward pass, and runs single blocks on it again."""

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure, range(structure.depth))
        self.calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def enter(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if block.index == 0 and hasattr(value, "get_seq_length") and int(value.get_seq_length()) > 0:
                raise self.structure.error(
                    block,
                    "it is given keys and values from elsewhere (prefix tuning, or a filled cache), and "
                    "running it again would change them",
                    "Give inputs without a cache, or disable the adapter",
                )
        stream = fetch((args, kwargs), block.entry).clone()  # the block may change its input in place
        self.calls[block.index] = replace((args, kwargs), block.entry, stream)

    def stream(self, block: Block) -> Tensor:
        """What entered the block, (batch, tokens, dim) as the model lays it out."""
        stream: Tensor = fetch(self.calls[block.index], block.entry)
        return stream

    def run(self, block: Block, stream: Tensor, edits: Edits) -> Tensor:
        """The block's output stream for another input stream, with `edits`."""
        args, kwargs = replace(self.calls[block.index], block.entry, stream.clone())
        with Editing(self.structure, edits) as editing:
            editing.forced = block.index
            out: Tensor = fetch(self.structure.module(block)(*args, **kwargs), block.exit)
        return out


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
    other = perturbed(x, block, slice(None))

    clean: dict[int, Tensor] = {}
    moved: dict[int, Tensor] = {}
    clean_ops: dict[int, Tensor] = {}
    moved_ops: dict[int, Tensor] = {}
    out = blocks.run(block, x, _branches_off(block, clean, clean_ops))
    _prove_identity(structure, block, x, out)
    # Every other token of the first sample: attention may look forward only, backward only, or at few.
    every_other = perturbed(x, block, slice(None, None, 2), only_first=True)
    blocks.run(block, every_other, _branches_off(block, moved, moved_ops))
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

    off = _everything_off(block)
    if not torch.equal(blocks.run(block, x, off), blocks.run(block, other, off)):
        raise structure.error(
            block,
            "its output still depends on its input with every skip and branch found switched off "
            f"({', '.join(j.where for j in block.junctions)}): a path was missed",
            f"This block cannot be probed exactly. {REPORT}",
        )
    _prove_skips(structure, block, blocks, x)


def _prove_identity(structure: Structure, block: Block, x: Tensor, out: Tensor) -> None:
    expected = x
    for norm in (n for j in block.junctions for n in j.norms):
        if norm.turn < 0:
            return  # a norm without a module cannot be applied from here; (3) and (4) still hold
        expected = structure.model.get_submodule(norm.name)(expected)
    if not torch.equal(expected, out):
        norms = any(j.norms for j in block.junctions)
        raise structure.error(
            block,
            f"with every branch off it is not {'its norms applied to its input' if norms else 'the identity'} "
            f"(adds at {', '.join(j.where for j in block.junctions)})",
            f"This block cannot be probed exactly. {REPORT}",
        )


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
            expected = structure.model.get_submodule(norm.name)(expected)
        if not torch.allclose(
            expected, after, rtol=_tolerance(x), atol=_tolerance(x) * float(after.abs().amax())
        ):
            raise structure.error(
                block,
                f"with the skip at {junction.where} off, not the branch alone goes on",
                f"This block cannot be probed exactly. {REPORT}",
            )


def _kind(branch: Branch, block: Block, clean: Tensor, moved: Tensor, block_shape: torch.Size) -> str:
    change = (moved - clean).abs().reshape(block_shape)
    tokens = change.shape[token_axis(block)]
    others = change.index_select(token_axis(block), torch.arange(1, tokens, 2, device=change.device))
    if tokens == 1:  # a last stage that is pooled to one token: nothing can be seen to move
        mixes = bool(branch.ops) or branch.has_product
    else:
        mixes = bool(others.amax() > _tolerance(clean) * clean.abs().amax())
    if mixes:
        return "attention" if branch.ops or branch.has_product else "mixer"
    return "cross" if branch.outside else "mlp"


def _leaks(block: Block, clean: Tensor, moved: Tensor, block_shape: torch.Size) -> bool:
    """Whether a change of the first sample reaches others."""
    if block.batch_axis is None:
        return False
    change = (moved - clean).abs().reshape(block_shape)
    others = change.narrow(block.batch_axis, 1, change.shape[block.batch_axis] - 1)
    return bool(others.amax() > _tolerance(clean) * clean.abs().amax())


def _proved_heads(
    op: AttentionOp, block: Block, x: Tensor, clean: dict[int, Tensor], moved: dict[int, Tensor]
) -> AttentionOp:
    """The op, with 0 heads where its layout is not proved to be (batch, heads, tokens, …) or folded.

    Only the first sample was changed, so only the first rows of the batch may differ; and the axis
    after the heads must hold the tokens, in windows or whole.
    """
    before, after = clean.get(op.ordinal), moved.get(op.ordinal)
    if before is None or after is None or before.ndim > 4 or op.heads < 1 or block.batch_axis is None:
        return replace_field(op, heads=0)
    samples, tokens = x.shape[block.batch_axis], x.shape[token_axis(block)]
    rows = before.shape[0] // samples  # per sample: windows, or folded heads
    differs = (before != after).flatten(1).any(1)
    windows = rows if before.ndim == 4 else rows // op.heads
    folds = before.ndim == 4 or rows == op.heads
    if differs[rows:].any() or not folds or windows * before.shape[-2] < tokens:
        return replace_field(op, heads=0)
    return op


def token_axis(block: Block) -> int:
    """The axis of the stream that counts tokens: the first that is neither batch nor features."""
    return next(a for a in range(block.ndim - 1) if a != block.batch_axis)


def perturbed(x: Tensor, block: Block, tokens: slice, *, only_first: bool = False) -> Tensor:
    """`x` with the chosen tokens of every (or only the first) sample replaced by noise of the same size."""
    generator = torch.Generator().manual_seed(0x5EED0F9B0BE)  # a user's own input may be randn of seed 0
    noise = torch.randn(x.shape, generator=generator).to(x) * x.std() + x.mean()
    index: list[Any] = [slice(None)] * x.ndim
    index[token_axis(block)] = tokens
    if only_first and block.batch_axis is not None:
        index[block.batch_axis] = slice(0, 1)
    y = x.clone()
    y[tuple(index)] = noise[tuple(index)]
    return y


def _tolerance(x: Tensor) -> float:
    return max(1e-5, 4 * torch.finfo(x.dtype).eps)


def _branches_off(block: Block, captured: dict[int, Tensor], ops: dict[int, Tensor]) -> Edits:
    """Each branch is captured, then removed, so that every branch sees the block's input itself.

    The results of attention operations are captured, too.
    """
    edits = Edits()

    def watching(ordinal: int) -> Function:
        def watch(value: Tensor) -> Tensor:
            ops[ordinal] = value.clone()
            return value

        return watch

    for op in (op for branch in block.branches for op in branch.ops):
        edits.at_op(block.index, op.ordinal, watching(op.ordinal))

    def taking(number: int) -> Function:
        def take(value: Tensor) -> Tensor:
            captured[number] = value.clone()
            return zero(value)

        return take

    for number, branch in enumerate(block.branches):
        edits.at(branch.site, taking(number))
    return edits


def _everything_off(block: Block) -> Edits:
    edits = Edits()
    for junction in block.junctions:
        for site in (junction.skip, *(b.site for b in junction.branches)):
            edits.at(site, zero)
    return edits


def _everywhere(structure: Structure, function: Function) -> Edits:
    edits = Edits()
    for block in structure.blocks:
        for junction in block.junctions:
            for site in (junction.skip, *(b.site for b in junction.branches)):
                edits.at(site, function)
    return edits


def _run_with(structure: Structure, edits: Edits, run: Callable[[], Any]) -> Any:
    with Editing(structure, edits):
        return run()


def _tensors(output: Any) -> list[Tensor]:
    return [t for _, t in walk(output) if t.is_floating_point()]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _refuse_unless(holds: bool, model: nn.Module, what: str, todo: str) -> None:
    if not holds:
        raise RcProbeError(what, where=type(model).__name__, todo=todo)
