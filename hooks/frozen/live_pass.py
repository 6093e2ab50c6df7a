"""Live paths: the model run along one path for each row of the batch, attention recomputed on the path's own states.

The evaluation of Dong et al. 2021, section 3.2, as its official code has it: where a path skips a block, the block
does nothing, its norms neither; where it takes a head, the block's stream becomes LN(y), y what this head alone adds
(output bias included), the norm without gain and bias, the skip gone; then the block's MLP as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rc_probe.hooks.edits.block_watch import BlockWatch, fetch, replace
from rc_probe.hooks.edits.edits import Editing, Edits
from rc_probe.hooks.edits.gates import scaling, weigh_heads
from rc_probe.hooks.structure.structure import AttentionOp, CandidateBlock, Structure

from .frozen_pass import Step, head_of
from .parts import NO_PARTS

EPS = 1e-12


def live_edits(structure: Structure, choices: list[Step], paths: Tensor) -> Edits:
    """The edits for a batch of one path a row. paths (rows, steps): 0 for the skip, else a head.

    Raises RcProbeError where a stream has no batch axis or features elsewhere than last, heads cannot be told
    apart, or a norm cannot be left out.
    """
    edits = Edits()
    for step, taken in zip(choices, paths.T, strict=True):
        block = structure.blocks[step.block]
        _check(structure, block, step)
        gone = scaling((taken == 0).float(), block.batch_axis, block.ndim)
        for site in step.others:
            edits.at(site, gone)
        for hop in step.hops:
            mine = head_of(step, hop, taken - 1).float()  # (rows, heads)
            edits.at(hop.site, _plain_norm(scaling(mine.sum(1), block.batch_axis, block.ndim)))
            for op in hop.ops:
                edits.at_op(step.block, op, partial(_weigh, op, mine))
        if block.junctions[step.junction].norms:
            edits.bypass.add((step.block, step.junction))
    return edits


def _weigh(op: AttentionOp, gates: Tensor, x: Tensor) -> Tensor:
    return weigh_heads(op, x, gates)


def _plain_norm(gate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda y: gate(functional.layer_norm(y, y.shape[-1:], eps=EPS))


def _check(structure: Structure, block: CandidateBlock, step: Step) -> None:
    if block.batch_axis is None or block.feature_axis != -1:
        raise structure.error(block, "its stream is not (batch, tokens, dim)", f"{NO_PARTS} live")
    if any(norm.turn < 0 for norm in block.junctions[step.junction].norms):
        raise structure.error(block, "its norm is no module and cannot be left out", f"{NO_PARTS} live")
    if any(hop.kind == "attention" and not hop.ops for hop in step.hops):
        raise structure.error(block, "the heads of its attention cannot be told apart", f"{NO_PARTS} live")


class Live(BlockWatch):
    """A context in which each row of the batch goes along its own path. paths (rows, steps)."""

    def __init__(self, structure: Structure, choices: list[Step], paths: Tensor) -> None:
        super().__init__(structure, range(structure.depth))
        self._editing = Editing(structure, live_edits(structure, choices, paths))
        by_block: dict[int, Tensor] = {}
        for step, taken in zip(choices, paths.T, strict=True):
            idle = by_block.get(step.block, torch.ones(len(paths), dtype=torch.bool))
            by_block[step.block] = idle & (taken == 0)
        self._idle = by_block  # rows that go by all steps of a block
        self._entered: Tensor | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        with self._editing:
            yield

    def enter(self, block: CandidateBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entered = fetch((args, kwargs), block.entry).clone()

    def leave(self, block: CandidateBlock, output: Any) -> Any:
        idle = self._idle.get(block.index)
        if idle is None:
            return None
        stream, entered = fetch(output, block.exit), self._entered
        assert entered is not None and block.batch_axis is not None
        if stream.shape != entered.shape:
            raise self.structure.error(block, "the stream changes its shape", f"{NO_PARTS} live")
        shape = [1] * stream.ndim
        shape[block.batch_axis] = -1
        kept = torch.where(idle.to(stream.device).reshape(shape), entered, stream)
        return replace(output, block.exit, kept)
