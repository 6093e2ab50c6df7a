"""Taps: the stream of every layer handed on as the model runs, nothing kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rc_probe.hooks.structure.structure import Candidate, CandidateBlock

from .block_watch import BlockWatch, fetch
from .model_state import recomputing

OnStream = Callable[[int, Tensor], None]


class StreamDone(Exception):  # noqa: N818 - a signal, not an error
    """The last layer was seen: the rest of the forward pass (the head) is not needed."""


class Tap(BlockWatch):
    """Calls `on_stream(layer, x)` with x (batch, tokens, dim) for layers 0 … L of every forward pass.

    Layer 0 is what enters block 1, layer l the stream after block l, before any final norm. Blocks that
    gradient checkpointing recomputes in a backward pass were seen before and are left out. With `stop`,
    the pass ends after the last layer by StreamDone; use `run_stopped`.
    """

    prepend = False  # what edits and the user's hooks make of a block's output goes on to the next

    def __init__(
        self, structure: Candidate, on_stream: OnStream, *, stop: bool = False, skipped: int = 0
    ) -> None:
        super().__init__(structure, range(structure.depth), skipped=skipped)
        self.on_stream, self.stop = on_stream, stop

    def enter(self, block: CandidateBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if block.index == 0 and not recomputing():
            self._hand_on(0, block, fetch((args, kwargs), block.entry))

    def leave(self, block: CandidateBlock, output: Any) -> None:
        if output is None or recomputing():
            return
        self._hand_on(block.index + 1, block, fetch(output, block.exit))
        if self.stop and block.index + 1 == self.structure.depth:
            raise StreamDone

    def _hand_on(self, layer: int, block: CandidateBlock, stream: Tensor) -> None:
        # What a statistic computes is not the model's: other contexts' modes must not count its adds.
        with torch.no_grad(), torch._C.DisableTorchFunction():
            self.on_stream(layer, batch_first(stream.detach(), block))


def batch_first(stream: Tensor, block: CandidateBlock) -> Tensor:
    """The stream as (batch, tokens, dim), from the layout of the block."""
    if block.feature_axis != -1:
        stream = stream.movedim(block.feature_axis, -1)
    if block.batch_axis is None:
        stream = stream.unsqueeze(0)
    elif block.batch_axis:
        stream = stream.movedim(block.batch_axis, 0)
    return stream.flatten(1, -2)


def laid_out(x: Tensor, block: CandidateBlock, like: Tensor) -> Tensor:
    """(batch, tokens, dim) in the layout of the block's own stream `like`: what batch_first undoes."""
    shape = like
    if block.feature_axis != -1:
        shape = shape.movedim(block.feature_axis, -1)
    if block.batch_axis is None:
        shape = shape.unsqueeze(0)
    elif block.batch_axis:
        shape = shape.movedim(block.batch_axis, 0)
    x = x.reshape(shape.shape)
    if block.batch_axis is None:
        x = x.squeeze(0)
    elif block.batch_axis:
        x = x.movedim(0, block.batch_axis)
    return x if block.feature_axis == -1 else x.movedim(-1, block.feature_axis)


def run_stopped(run: Callable[[], Any]) -> None:
    """Run a forward pass that a Tap with `stop` may end early."""
    try:
        run()
    except StreamDone:
        return
