"""Taps: the stream of every layer handed on as the model runs, nothing kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import Candidate, CandidateBlock
from rc_probe.hooks.undo import unseen

from .block_watch import BlockWatch, fetch
from .forward_calls import given_to
from .model_state import recomputing

OnStream = Callable[[int, Tensor], None]


class StreamDone(Exception):  # noqa: N818 - a signal, not an error
    """The last layer was seen: the rest of the forward pass (the head) is not needed."""


class Tap(BlockWatch):
    """Calls `on_stream(layer, x)` with x (batch, tokens, dim) for layers 0 … L of every forward pass of the user's.

    Layer 0 is what enters block 1, layer l the stream after block l, before any final norm; what the user's hooks on
    a block make of these belongs to the stream. Of several streams side by side x is (batch, tokens, streams · dim), those of
    a token one after the other. Blocks that gradient checkpointing recomputes in a backward pass were
    seen before and are left out. With `stop`, the pass ends after the last layer by StreamDone; use `run_stopped`.
    """

    observes = True

    def __init__(
        self, structure: Candidate, on_stream: OnStream, *, stop: bool = False, skipped: int = 0
    ) -> None:
        super().__init__(structure, range(structure.depth), skipped=skipped)
        self.on_stream, self.stop = on_stream, stop
        self._left: tuple[CandidateBlock, Tensor] | None = None  # what hooks before the next block may change
        self._first: tuple[Any, Any] | None = None  # (args, kwargs) of block 1, while layer 0 is handed on

    def begin(self) -> None:
        self._left = None

    def enter(self, block: CandidateBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recomputing():
            return
        stream = fetch((args, kwargs), block.entry)
        if self._left is not None:
            before, left = self._left
            self._left = None
            changed = before.index + 1 == block.index and fetch(self.called_with, block.entry) is not stream
            self._hand_on(before.index + 1, block if changed else before, stream if changed else left)
        if block.index == 0:
            self._first = args, kwargs
            try:
                self._hand_on(0, block, stream)
            finally:
                self._first = None

    def returned(self, block: CandidateBlock, output: Any) -> None:
        if recomputing():
            return
        stream = fetch(output, block.exit)
        if self._changes_next(block):
            self._left = block, stream
            return
        self._hand_on(block.index + 1, block, stream)
        if self.stop and block.index + 1 == self.structure.depth:
            raise StreamDone

    def _masks(self) -> Iterator[tuple[str, Tensor]]:
        """Of what enters block 1, by name: what may say which tokens are real."""
        forward = self.structure.module(self.structure.blocks[0]).forward
        for name, value in given_to(forward, *self._first).items() if self._first else ():
            if isinstance(value, Tensor) and "mask" in name:
                yield name, value

    def fit(self, real: Tensor, x: Tensor) -> Tensor | None:
        """Which tokens of the stream x (batch, tokens, dim) are real, where the text has others; None: all of them.

        real: (batch, tokens) bool, of the text. A model that pads by itself, or puts learned prompts in front, hands on
        a mask in which the text's own is a part. To be called while layer 0 is handed on. Raises RcProbeError where
        no mask of block 1 tells it.
        """
        if real.shape == x.shape[:2]:
            return real
        read = [_read(name, given, *x.shape[:2]) for name, given in self._masks()]
        masks = [mask for mask in read if mask is not None]
        found = [mask for mask in masks if _holds(mask, real.to(x.device))]
        if found and all(torch.equal(mask, found[0]) for mask in found):
            return found[0]
        if bool(real.all()) and all(bool(mask.all()) for mask in masks):
            return None  # prompts, latents: all of them are attended to
        raise RcProbeError(
            f"the text has {real.shape[1]} tokens and its stream {x.shape[1]}: the model adds tokens of its own, and which ones "
            "are real cannot be told",
            where=type(self.structure.model).__name__,
            todo="Say attach(model, mask=…), the mask of the stream; or give texts that the model does not have to pad",
        )

    def _changes_next(self, block: CandidateBlock) -> bool:
        """Whether there are hooks that may change the stream before the next block begins."""
        if block.index + 1 == self.structure.depth:
            return False
        following = self.structure.module(self.structure.blocks[block.index + 1])
        return bool(following._forward_pre_hooks)

    def _hand_on(self, layer: int, block: CandidateBlock, stream: Tensor) -> None:
        # What a statistic computes is not the model's: other contexts' modes must not count its adds.
        with torch.no_grad(), unseen():
            self.on_stream(layer, batch_first(stream.detach(), block))


def _read(name: str, given: Tensor, samples: int, tokens: int) -> Tensor | None:
    """What a mask says of the tokens, (samples, tokens) bool, whether it is bool, 0 and 1, or added to scores."""
    if given.ndim == 4 and given.shape[0] == samples and given.shape[2:] == (tokens, tokens):
        given = given[:, 0].amax(1) if given.dtype != torch.bool else given[:, 0].any(1)  # seen by any query
    if given.ndim < 2 or given.shape[0] != samples or given.numel() != samples * tokens:
        return None
    flat = given.reshape(samples, tokens)
    if flat.dtype == torch.bool and ("masked" in name or "padding" in name):
        return ~flat
    added = flat.is_floating_point() and bool((flat < -1).any())
    return flat >= 0 if added or bool((flat == 0).all()) else flat != 0


def _holds(mask: Tensor, real: Tensor) -> bool:
    """Whether `real` is a part of the mask, at one place, and all outside of it is real or nothing of it is."""
    length, found = real.shape[1], 0
    for start in range(mask.shape[1] - length + 1):
        outside = torch.cat([mask[:, :start], mask[:, start + length :]], 1)
        same = torch.equal(mask[:, start : start + length], real)
        found += same and (bool(outside.all()) or not bool(outside.any()))
    return found == 1


def batch_first(stream: Tensor, block: CandidateBlock) -> Tensor:
    """The stream as (batch, tokens, dim), from the layout of the block; several of them as (batch, tokens, streams · dim)."""
    if block.streams > 1:
        return stream.permute(_order(block)).flatten(2)
    if block.feature_axis != -1:
        stream = stream.movedim(block.feature_axis, -1)
    if block.batch_axis is None:
        stream = stream.unsqueeze(0)
    elif block.batch_axis:
        stream = stream.movedim(block.batch_axis, 0)
    return stream.flatten(1, -2)


def each_stream(x: Tensor, streams: int) -> tuple[Tensor, ...]:
    """What a Tap hands on of several streams, (batch, tokens, streams · dim), as one (batch, tokens, dim) each."""
    parts: tuple[Tensor, ...] = x.unflatten(-1, (streams, -1)).unbind(-2)
    return parts


def _order(block: CandidateBlock) -> tuple[int, int, int, int]:
    """The axes of several streams side by side: samples, tokens, streams, features."""
    assert block.batch_axis is not None
    return block.batch_axis, 3 - block.batch_axis - block.stream_axis, block.stream_axis, 3


def laid_out(x: Tensor, block: CandidateBlock, like: Tensor) -> Tensor:
    """(batch, tokens, dim) in the layout of the block's own stream `like`: what batch_first undoes."""
    if block.streams > 1:
        order = _order(block)
        return x.reshape([like.shape[axis] for axis in order]).permute(
            [order.index(axis) for axis in range(4)]
        )
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
