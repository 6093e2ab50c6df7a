"""What is proved of one block, by running it again on the inputs that it got."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from rc_probe.hooks.edits.block_mode import Function
from rc_probe.hooks.edits.edits import Edits, zero
from rc_probe.hooks.structure.structure import (
    INTERFACE,
    REPORT,
    AttentionOp,
    Candidate,
    CandidateBlock,
    CandidateBranch,
    Kind,
    NormCall,
    Site,
)
from rc_probe.hooks.structure.tape import walk

from .constant_branches import Proved, is_constant
from .replay import Replay, every_other, everywhere, noise_like, rounding, token_axes, token_axis, tolerance
from .scaled_skips import prove_scaling


@dataclass
class Branches:
    """What the branches of a block gave in one run. added: to the stream; ops: what their attention ops returned"""

    added: dict[Site, Tensor] = field(default_factory=dict)
    ops: dict[AttentionOp, Tensor] = field(default_factory=dict)


def prove_block(candidate: Candidate, block: CandidateBlock, blocks: Replay) -> Proved:
    """The block with what (2) to (5) prove of it, such as the kinds of its branches.

    Raises RcProbeError for what does not hold.
    """
    if block.index not in blocks.calls:
        raise candidate.error(
            block, "its hooks did not fire", f"Call the model, not its forward method. {REPORT}"
        )
    x = blocks.stream(block)
    if not torch.isfinite(x).all():
        raise candidate.error(
            block, "the stream that enters it holds NaN or infinity", "Check the model's weights"
        )
    clean, moved = Branches(), Branches()
    out = blocks.run(block, x, _branches_off(block, clean))
    scaled = not _is_identity(candidate, block, x, out)
    if scaled:
        prove_scaling(blocks, block, x)
    blocks.run(block, _every_other_like_the_next(x, block), _branches_off(block, moved))
    proved = {
        branch: _prove_branch(candidate, block, branch, clean, moved, blocks) for branch in block.branches
    }
    off = everywhere([block], zero)
    if not torch.equal(blocks.run(block, x, off), blocks.run(block, noise_like(x), off)):
        raise candidate.error(
            block,
            "its output still depends on its input with every skip and branch found switched off "
            f"({', '.join(j.where for j in block.junctions)}): a path was missed",
            f"This block cannot be probed exactly. {REPORT}",
        )
    if not scaled:
        _prove_skips(candidate, block, blocks, x)
    branches = {old.site: new for old, (new, _) in proved.items()}
    junctions = (replace(j, branches=tuple(branches[b.site] for b in j.branches)) for j in block.junctions)
    kinds = {branch.site: kind for branch, kind in proved.values()}
    return Proved(replace(block, junctions=tuple(junctions)), kinds, scaled)


def _prove_branch(
    candidate: Candidate,
    block: CandidateBlock,
    branch: CandidateBranch,
    clean: Branches,
    moved: Branches,
    blocks: Replay,
) -> tuple[CandidateBranch, Kind | None]:
    """The branch with the heads that are proved, and its kind; None where it is constant."""
    x = blocks.stream(block)
    before, after = clean.added[branch.site], moved.added[branch.site]
    ops = tuple(_proved_heads(op, block, x, clean.ops, moved.ops) for op in branch.ops)
    proved = replace(branch, ops=ops)
    if torch.equal(before, after):
        _refuse_unless_constant(candidate, block, branch, before, blocks)
        return proved, None
    if _leaks(block, before, after, x.shape):
        raise candidate.error(
            block,
            "what it adds to one sample of a batch depends on the others",
            "The first axis of the inputs must count samples (wrap a model that takes time first); "
            "int8 that shares one scale over the batch cannot be probed: use one scale a token (torchao)",
        )
    return proved, _kind(proved, block, before, after, x.shape)


def _refuse_unless_constant(
    candidate: Candidate, block: CandidateBlock, branch: CandidateBranch, value: Tensor, blocks: Replay
) -> None:
    """What a branch adds did not change with every other token: it must be the same everywhere, for noise, too."""
    other, x = Branches(), blocks.stream(block)
    blocks.run(block, noise_like(x), _branches_off(block, other))
    if is_constant(
        block.outside(value, x.shape), block.outside(other.added[branch.site], x.shape), block.feature_axis
    ):
        return
    where = next(j.where for j in block.junctions if branch in j.branches)
    raise candidate.error(
        block,
        f"what it adds to the stream at {where} is not computed from the stream that enters it, but from "
        "another value that it is given: this module is not a whole block",
        f"Name the modules that hold whole blocks (--blocks), if there are any. {REPORT}",
    )


def _normed(candidate: Candidate, block: CandidateBlock, norm: NormCall, x: Tensor) -> Tensor:
    try:
        outputs = walk(candidate.model.get_submodule(norm.name)(x))
        out = next(tensor for _, tensor in outputs)  # some return a scale of a number format beside it
    except Exception as error:  # the module's own, of any kind
        what = f"its {norm.name} cannot be applied to the stream alone ({type(error).__name__})"
        raise candidate.error(block, what, f"This block cannot be probed. {REPORT}") from error
    return out


def _is_identity(candidate: Candidate, block: CandidateBlock, x: Tensor, out: Tensor) -> bool:
    expected = block.inside(x)
    for norm in (*block.norms, *(n for j in block.junctions for n in j.norms)):
        if norm.turn < 0:
            return True  # a norm without a module cannot be applied from here; (3) and (4) still hold
        expected = _normed(candidate, block, norm, expected)
    return torch.equal(expected, block.inside(out))


def _prove_skips(candidate: Candidate, block: CandidateBlock, blocks: Replay, x: Tensor) -> None:
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
    out = block.inside(blocks.run(block, x, edits))
    for junction, branches, after in zip(block.junctions, kept, [*skips[1:], out], strict=True):
        if any(norm.turn < 0 for norm in junction.norms):
            continue
        expected = sum(branches[1:], branches[0]).reshape(after.shape)
        for norm in junction.norms:
            expected = _normed(candidate, block, norm, expected)
        expected = expected.to(after.dtype)  # some add their branches to a stream of higher precision
        if not torch.allclose(
            expected, after, rtol=tolerance(x), atol=tolerance(x) * float(after.abs().amax())
        ):
            raise candidate.error(
                block,
                f"with the skip at {junction.where} off, not the branch alone goes on",
                f"This block cannot be probed exactly. {REPORT}",
            )


def _kind(
    branch: CandidateBranch, block: CandidateBlock, clean: Tensor, moved: Tensor, shape: torch.Size
) -> Kind:
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


def _leaks(block: CandidateBlock, clean: Tensor, moved: Tensor, shape: torch.Size) -> bool:
    """Whether a change of the first sample reaches others, by more than kernels round."""
    if block.batch_axis is None or shape[block.batch_axis] == 1:
        return False
    change = block.outside((moved - clean).abs(), shape)
    others = change.narrow(block.batch_axis, 1, shape[block.batch_axis] - 1)
    return bool(others.amax() > tolerance(clean) * clean.abs().amax())


def _changed(
    branch: CandidateBranch, block: CandidateBlock, clean: Tensor, moved: Tensor, shape: torch.Size
) -> Tensor:
    """Which tokens differ by more than rounding, next to their own size; one value for all features."""
    before, after = block.outside(clean, shape), block.outside(moved, shape)
    change = (after - before).abs().amax(block.feature_axis, keepdim=True)
    return change > rounding(clean, branch) * before.abs().amax(block.feature_axis, keepdim=True)


def _proved_heads(
    op: AttentionOp,
    block: CandidateBlock,
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
        return replace(op, heads=0)
    if op.via == INTERFACE:
        before, after = before.transpose(1, 2), after.transpose(1, 2)
    samples, tokens = x.shape[block.batch_axis], x.shape[token_axis(block)]
    rows = before.shape[0] // samples  # per sample: windows, or folded heads
    differs = (before != after).flatten(1).any(1)
    windows = rows if before.ndim == 4 else rows // op.heads
    folds = before.ndim == 4 or rows == op.heads
    if differs[rows:].any() or not folds or windows * before.shape[-2] < tokens:
        return replace(op, heads=0)
    return op


def _every_other_like_the_next(x: Tensor, block: CandidateBlock) -> Tensor:
    """Every other token of the first sample becomes nearly its neighbour.

    Every other, as attention may look forward only, backward only, or at few; like the neighbour, as
    a saturated pattern that looks at one token only then has to look at two.
    """
    noisy = x.roll(-1, token_axes(block)[-1]) + 0.3 * noise_like(x)
    chosen = every_other(x.shape, block).to(x.device).expand(x.shape).clone()
    if block.batch_axis is not None:
        chosen.narrow(block.batch_axis, 1, x.shape[block.batch_axis] - 1).fill_(False)
    return torch.where(chosen, noisy, x)


def _branches_off(block: CandidateBlock, captured: Branches) -> Edits:
    """Each branch is captured, then removed, so that every branch sees the block's input itself."""
    edits = Edits()

    def watch(op: AttentionOp, value: Tensor) -> Tensor:
        captured.ops[op] = value.clone()
        return value

    def take(site: Site, value: Tensor) -> Tensor:
        captured.added[site] = value.clone()
        return zero(value)

    for branch in block.branches:
        for op in branch.ops:
            edits.at_op(block.index, op, partial(watch, op))
        edits.at(branch.site, partial(take, branch.site))
    return edits
