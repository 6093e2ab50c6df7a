"""What is proved of blocks that hand on several streams side by side, by running them again on other streams."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rc_probe.hooks.edits.edits import FIRST, Edits
from rc_probe.hooks.structure.structure import REPORT, Block, Candidate, CandidateBlock, Structure

from .replay import Replay, noise_like, tolerance

PROVED = (
    "observed, its output is bitwise the plain output",
    "each block gets what the block before it returned, and returns something else for other values of any of its streams",
    "what a block makes of one sample of a batch does not depend on the others",
)


def prove_streams(candidate: Candidate, run: Callable[[], bool]) -> Structure:
    """The stack with what is proved of it: `PROVED`. run: a whole pass; whether its output is bitwise the plain one.

    Raises RcProbeError for what does not hold.
    """
    replay = Replay(candidate)
    with replay:
        same = run()
    first = candidate.blocks[0]
    if not same:
        raise candidate.error(first, "the output changes although it is only observed", REPORT)
    for block in candidate.blocks:
        if block.index not in replay.calls:
            todo = f"Call the model, not its forward method. {REPORT}"
            raise candidate.error(block, "its hooks did not fire", todo)
        _prove_block(candidate, block, replay)
    blocks = tuple(Block(**vars(block) | {"scaled": False}) for block in candidate.blocks)
    return Structure(**vars(candidate) | {"blocks": blocks, "proved": PROVED})


def _prove_block(candidate: Candidate, block: CandidateBlock, replay: Replay) -> None:
    x = replay.stream(block)
    if not torch.isfinite(x).all():
        what = "the streams that enter it hold NaN or infinity"
        raise candidate.error(block, what, "Check the model's weights")
    again: Callable[[Tensor], Tensor] = lambda streams: replay.run(block, streams, _none(block))  # noqa: E731
    out, noise = again(x), noise_like(x)
    for number in range(block.streams):
        if torch.equal(out, again(_with(x, noise, block.stream_axis, number))):
            what = f"what it returns does not depend on its stream {number + 1}: this is no axis of streams"
            raise candidate.error(block, what, f"This block cannot be measured. {REPORT}")
    assert block.batch_axis is not None
    change = (again(_with(x, noise, block.batch_axis, 0)) - out).abs()
    others = change.narrow(block.batch_axis, 1, change.shape[block.batch_axis] - 1)
    if bool(others.amax() > tolerance(x) * out.abs().amax()):
        what = "what it makes of one sample of a batch depends on the others"
        raise candidate.error(block, what, "The first axis of the inputs must count samples")


def _none(block: CandidateBlock) -> Edits:
    """Edits that change nothing in the block, so that its call is watched: it has no norm to leave out."""
    return Edits(bypass={(block.index, FIRST)})


def _with(x: Tensor, other: Tensor, axis: int, index: int) -> Tensor:
    changed = x.clone()
    changed.select(axis, index).copy_(other.select(axis, index))
    return changed
