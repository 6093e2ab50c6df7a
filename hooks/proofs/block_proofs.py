"""What is proved of one block, by running it again on the inputs that it got."""

from __future__ import annotations

from dataclasses import replace as replace_field

import torch
from torch import Tensor

from rc_probe.hooks.edits.block_mode import Function
from rc_probe.hooks.edits.edits import Edits, zero
from rc_probe.hooks.structure.structure import (
    INTERFACE,
    REPORT,
    AttentionOp,
    Block,
    Branch,
    NormAfter,
    Structure,
)

from .replay import Replay, all_off, every_other, noise_like, rounding, token_axes, token_axis, tolerance
from .scaled_skips import prove_scaling


def prove_block(structure: Structure, block: Block, blocks: Replay) -> None:
    """(2) to (5) for one block; sets the kinds of its branches. Raises RcProbeError for what does not hold."""
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


def _kind(branch: Branch, block: Block, clean: Tensor, moved: Tensor, shape: torch.Size) -> str:
    untouched = ~every_other(shape, block)
    folded = block.batch_axis is None and shape[token_axis(block)] == 1
    if (
        folded or not untouched.any()
    ):  # one token in a sample, as in a last stage: nothing can be seen to move
        mixes = branch.attends
    else:
        mixes = bool((_changed(branch, block, clean, moved, shape) & untouched.to(clean.device)).any())
    if mixes:
        return "attention" if branch.attends else "mixer"
    return "cross" if branch.outside else "mlp"


def _leaks(block: Block, clean: Tensor, moved: Tensor, shape: torch.Size) -> bool:
    """Whether a change of the first sample reaches others, by more than kernels round."""
    if block.batch_axis is None:
        return False
    change = (moved - clean).abs().reshape(shape)
    others = change.narrow(block.batch_axis, 1, shape[block.batch_axis] - 1)
    return bool(others.amax() > tolerance(clean) * clean.abs().amax())


def _changed(branch: Branch, block: Block, clean: Tensor, moved: Tensor, shape: torch.Size) -> Tensor:
    """Which tokens differ by more than rounding, next to their own size; one value for all features."""
    before, after = clean.reshape(shape), moved.reshape(shape)
    change = (after - before).abs().amax(block.feature_axis, keepdim=True)
    return change > rounding(clean, branch) * before.abs().amax(block.feature_axis, keepdim=True)


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
    noisy = x.roll(-1, token_axes(block)[-1]) + 0.3 * noise_like(x)
    chosen = every_other(x.shape, block).to(x.device).expand(x.shape).clone()
    if block.batch_axis is not None:
        chosen.narrow(block.batch_axis, 1, x.shape[block.batch_axis] - 1).fill_(False)
    return torch.where(chosen, noisy, x)


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
