"""Single blocks run again on what they got in a forward pass, with edits."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rc_probe.hooks.edits.block_mode import Function
from rc_probe.hooks.edits.block_watch import BlockWatch, fetch, replace
from rc_probe.hooks.edits.edits import Editing, Edits
from rc_probe.hooks.edits.recording import filled
from rc_probe.hooks.structure.structure import Candidate, CandidateBlock, CandidateBranch

Calls = dict[int, tuple[tuple[Any, ...], dict[str, Any]]]  # by block: args, kwargs


class Replay(BlockWatch):
    """Records what each block call gets in a forward pass, and runs single blocks on it again.

    calls: what they got in an earlier pass
    """

    def __init__(self, structure: Candidate, calls: Calls | None = None) -> None:
        super().__init__(structure, range(structure.depth))
        self.calls: Calls = calls or {}

    def enter(self, block: CandidateBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if block.index == 0 and filled(value):
                raise self.structure.error(
                    block,
                    "it is given keys and values from elsewhere (prefix tuning, or a filled cache), and "
                    "running it again would change them",
                    "Give inputs without a cache, or disable the adapter",
                )
        stream = fetch((args, kwargs), block.entry).clone()  # the block may change its input in place
        self.calls[block.index] = replace(_own((args, kwargs)), block.entry, stream)

    def stream(self, block: CandidateBlock) -> Tensor:
        """What entered the block, (batch, tokens, dim) as the model lays it out."""
        stream: Tensor = fetch(self.calls[block.index], block.entry)
        return stream

    def run(self, block: CandidateBlock, stream: Tensor, edits: Edits) -> Tensor:
        """The block's output stream for another input stream, with `edits`."""
        args, kwargs = replace(_own(self.calls[block.index]), block.entry, stream.clone())
        if not edits.blocks:  # the block is watched all the same
            edits = everywhere([block], lambda x: x)
        with _Once(self.structure, edits, block, (args, kwargs)) as once:
            self.structure.module(block)(*args, **kwargs)
        out: Tensor = fetch(once.output, block.exit)
        return out


class _Once(Editing):
    """One block call with edits, on these arguments and to this output whatever the user's hooks on it would make of them."""

    def __init__(
        self,
        structure: Candidate,
        edits: Edits,
        block: CandidateBlock,
        given: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> None:
        super().__init__(structure, edits)
        self.forced, self.arguments = block.index, given
        self.output: Any = None

    def enter(self, block: CandidateBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        super().enter(block, *self.arguments)
        return self.arguments

    def leave(self, block: CandidateBlock, output: Any) -> None:
        super().leave(block, output)  # nothing but what an edit of operands gives: no block is left out
        self.output = output


def _own(value: Any) -> Any:
    """Nested arguments with copies of what a block may write into, such as a cache of keys and values."""
    if isinstance(value, (tuple, list)) and type(value) in {tuple, list}:
        return type(value)(_own(item) for item in value)
    if type(value) is dict:
        return {key: _own(item) for key, item in value.items()}
    if type(value).__module__.split(".")[0] in {"builtins", "torch"} or isinstance(value, nn.Module):
        return value
    return copy.deepcopy(value)


def everywhere(blocks: Iterable[CandidateBlock], function: Function) -> Edits:
    """Every branch and every skip handed through `function`."""
    edits = Edits()
    for site in (site for block in blocks for junction in block.junctions for site in junction.sites):
        edits.at(site, function)
    return edits


def token_axes(block: CandidateBlock) -> list[int]:
    """The axes of the stream that count tokens: all but batch, features and several streams. Images may have two."""
    kept = {block.batch_axis, block.feature_axis % block.ndim, block.stream_axis}
    return [axis for axis in range(block.ndim) if axis not in kept]


def token_axis(block: CandidateBlock) -> int:
    """The first of them; where samples are folded into that one, the last."""
    axes = token_axes(block)
    return axes[-1] if block.batch_axis is None else axes[0]


def every_other(shape: Sequence[int], block: CandidateBlock) -> Tensor:
    """Every other token, as on a chessboard; bool, of as many axes as the stream."""
    total = torch.zeros([1] * block.ndim, dtype=torch.long)
    for axis in token_axes(block):
        total = total + torch.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(block.ndim)])
    return total % 2 == 0


def noise_like(x: Tensor) -> Tensor:
    """Noise of the size of `x`, the same for the same shape; of size 1 where `x` is one number everywhere."""
    generator = torch.Generator().manual_seed(0x5EED0F9B0BE)  # a user's own input may be randn of seed 0
    spread = x.std()
    size = torch.where(spread > 0, spread, torch.ones_like(spread))
    return torch.randn(x.shape, generator=generator).to(x) * size + x.mean()


def tolerance(x: Tensor) -> float:
    return max(1e-5, 4 * torch.finfo(x.dtype).eps)


def rounding(x: Tensor, branch: CandidateBranch) -> float:
    """What a branch may change in a token when only others change: sums of another order round otherwise.

    In half precision that is a last bit; what a convolution moves may be as little, and is exact.
    """
    return 1e-5 if branch.convolves else max(1e-5, torch.finfo(x.dtype).eps)
