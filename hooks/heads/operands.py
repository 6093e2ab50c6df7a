"""What enters the attention ops of read heads, as a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rc_probe.hooks.edits.attention.masks import apart
from rc_probe.hooks.edits.attention_interface import OpCall
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.undo import unseen

from .forms import Heads, Projection
from .passes import operands

OnOperands = Callable[[int, Tensor, Tensor], None]
OnPart = Callable[[str, Tensor, Tensor], None]


def watch_operands(heads: Iterable[Heads], on_operands: OnOperands) -> Edits:
    """Edits that change nothing: on_operands(block from 0, query, key), (batch, heads, tokens, width), keys repeated for their groups."""
    edits = Edits()
    for each in heads:
        edits.watch_op(each.block.index, each.op, partial(_watch, each, on_operands))
    return edits


def _watch(each: Heads, on_operands: OnOperands, call: OpCall, result: Any) -> None:
    with torch.no_grad(), unseen():
        query, key, _ = (apart(x.detach(), each.op.heads) for x in operands(call))
        on_operands(each.block.index, query, key.repeat_interleave(query.shape[1] // key.shape[1], 1))


def watch_projections(heads: Heads, on_part: OnPart) -> Edits:
    """Edits that change nothing: on_part(`query` or `key`, z, heads' vectors before positions turn them).

    z (batch, tokens, dim) is what the projection reads, the vectors are (batch, tokens, heads, width) float64, of key heads
    as they are shared.
    """
    edits = Edits()
    for part, projection in (("query", heads.query), ("key", heads.key)):
        see = partial(_see, part, projection, on_part)
        edits.at_module(heads.block.index, projection.name, projection.turn, see)
    return edits


def _see(part: str, projection: Projection, on_part: OnPart, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad(), unseen():
        mine = y.detach()[..., projection.features.to(y.device)].double()
        on_part(part, x.detach(), mine * projection.scale.to(y.device))
    return y
