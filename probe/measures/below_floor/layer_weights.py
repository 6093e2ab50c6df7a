"""The weights of an attention layer as the theorem sees them, taken from the layer's own computation."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.proofs.replay import Replay
from rc_probe.hooks.split.rules import Attention, Split, propagate, watching
from rc_probe.hooks.structure.structure import Block

NOT_COVERED = "No bound is computed"
AGREE = 1e-6  # relative; what was taken apart must give the layer back


@dataclass(frozen=True)
class Heads:
    """The weights of one attention layer, its scores being (X w_q)(X w_k)^T / sqrt(d_qk).

    w_q, w_k (H, D, d_qk), w_v (H, D, d), w_o (H, d, D).
    """

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_o: Tensor


class _Enough(Exception):  # noqa: N818 - a signal, not an error
    """What was wanted was seen: the rest of the block is not needed."""


def attention_branch(replay: Replay, block: Block, edits: Edits) -> Callable[[Split], Split]:
    """Runs `block` with `edits` up to the add of its one attention branch, and returns the branch's value."""
    sites = [branch.site for branch in block.branches if branch.kind == "attention"]
    if len(sites) != 1:
        raise RcProbeError(
            f"it has {len(sites)} attention branches, not one",
            where=f"block {block.index + 1}",
            todo=NOT_COVERED,
        )
    found: list[Split] = []

    def capture(value: Any) -> Any:
        found.append(value)
        raise _Enough

    stopping = replace(edits, operands={**edits.operands, sites[0]: capture})

    def run(x: Split) -> Split:
        try:
            replay.run(block, x, stopping)
        except _Enough:
            if not found:
                raise  # somebody else had enough, within the branch
        return found.pop()

    return run


def take_apart(branch: Callable[[Split], Split], x: Split) -> tuple[Split, Heads, Split]:
    """An attention branch as the theorem sees it, without knowing its modules.

    branch(x) runs the block and returns what its attention branch adds to the stream, before the skip and any
    norm after it. x is the stream that enters the block, one sample.
    The tokens of the theorem are what enters the weight matrices of queries, keys and values: the stream
    (post-LN) or the normed stream (pre-LN). The matrices are read off by sending the unit vectors in
    their place, the output matrices by sending them in place of the heads' results. The parts are
    put together again and must give the branch's residual.

    Returns the tokens, the heads, the branch's value. Raises RcProbeError, saying why, where the theorem does
    not apply: causal masks, relative or rotary positions, norms of queries and keys, gates.
    """
    with watching() as watch:
        out = propagate(branch, x)
    if len(watch.seen) != 1:
        raise RcProbeError(f"the branch has {len(watch.seen)} attentions, not one", todo=NOT_COVERED)
    tokens, numbers = _tokens(watch.seen[0])
    with torch.no_grad():
        heads = _weights(branch, x, tokens, numbers, watch.seen[0].value)
    _check(heads, tokens.residual.reshape(-1, tokens.shape[-1]), watch.seen[0], one_sample(out))
    return tokens, heads, out


def tokens_of(branch: Callable[[Split], Split], x: Split) -> Split:
    """The tokens of the theorem alone: what enters the weight matrices of queries, keys and values (see `take_apart`)."""
    with watching() as watch:
        propagate(branch, x)
    return _tokens(watch.seen[0])[0]


def one_sample(x: Split, mask: Tensor | None = None) -> Tensor:
    """The residual (T, D) of the real tokens of one sample, about their mean."""
    residual = x.recentred(mask).residual.movedim(x.axis, -2)
    residual = residual.reshape(residual.shape[-2:])
    return residual if mask is None else residual[mask]


def _tokens(attention: Attention) -> tuple[Split, list[int]]:
    """What enters the weight matrices of queries, keys and values, and their numbers."""
    if attention.pattern.common is None:
        raise RcProbeError(
            "scores have no row common to all queries (causal mask, relative or rotary positions), "
            "which the theorem does not cover",
            todo=NOT_COVERED,
        )
    sources = [part.source for part in (attention.query, attention.key, attention.value)]
    found = [source for source in sources if source is not None]
    if len(found) < 3 or any(not torch.equal(x.residual, found[0][1].residual) for _, x in found):
        raise RcProbeError(
            "queries, keys and values are not linear in the same tokens, which the theorem does not cover",
            todo=NOT_COVERED,
        )
    return found[0][1], [number for number, _ in found]


def _weights(
    branch: Callable[[Split], Split], x: Split, tokens: Split, numbers: list[int], value: Split
) -> Heads:
    """What the unit vectors give as queries, keys and values, and, in place of the heads' results, as the branch's value.

    numbers: of the matrices that `tokens` enter; value: of the heads. Both kinds of unit vectors go through in one run.
    """
    count, dim = value.shape[-3], value.shape[-1]
    read: list[list[Tensor]] = [[], [], []]
    written: list[Tensor] = []
    scale = 0.0
    many = tokens.shape[tokens.axis]
    entering = _unit_vectors(tokens.shape[-1], tokens.device).split(many)
    leaving = _unit_vectors(count * dim, value.device).view(-1, count, dim).split(many)
    for rows, results in itertools.zip_longest(entering, leaving):
        token = None if rows is None else partial(_put, rows, numbers)
        result = _stop if results is None else partial(_instead, results)
        with watching(result, token) as watch, contextlib.suppress(_Enough):
            given = branch(x).residual
            written.append(given.reshape(many, -1)[: len(results)])
        seen = watch.seen[0]
        if rows is not None:
            query, key, of_value = seen.query.residual, seen.key.residual.mT, seen.value.residual
            for kept, part in zip(read, (query, key, of_value), strict=True):
                kept.append(part.flatten(0, -3)[:, : len(rows)])
            scale = scale or _scale(query @ key.mT, seen.pattern.scores.rest)
    w_q, w_k, w_v = (torch.cat(kept, dim=1) for kept in read)
    w_o = torch.cat(written).view(count, dim, -1)
    return Heads(w_q * scale * math.sqrt(w_q.shape[-1]), w_k, w_v, w_o)


def _unit_vectors(count: int, device: Any) -> Tensor:
    return torch.eye(count, dtype=torch.float64, device=device)


def _stop(out: Split) -> Split:
    raise _Enough


def _put(rows: Tensor, numbers: list[int], number: int, token: Split) -> Split:
    return _instead(rows, token) if number in numbers else token


def _scale(product: Tensor, scores: Tensor) -> float:
    at = product.abs().argmax()
    return float(scores.flatten()[at] / product.flatten()[at])


def _instead(rows: Tensor, x: Split) -> Split:
    """A Split of the shape of x: `rows` (n, ..., D) as its first tokens, zero for the others, centre zero."""
    residual = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    first = residual.movedim(x.axis, 0)[: len(rows)]
    first.copy_(rows.view(len(rows), *[1] * (first.ndim - rows.ndim), *rows.shape[1:]))
    return Split(torch.zeros_like(residual.narrow(x.axis, 0, 1)), residual, x.axis)


def _check(heads: Heads, tokens: Tensor, attention: Attention, out: Tensor) -> None:
    """Scores and result put together from the parts are those of the model."""
    pattern = attention.pattern.rest.flatten(0, -3)
    scores = attention.pattern.scores.rest.flatten(0, -3)
    parts = (tokens @ heads.w_q) @ (tokens @ heads.w_k).mT / math.sqrt(heads.w_q.shape[-1])
    result = (pattern @ (tokens @ heads.w_v) @ heads.w_o).sum(0)
    result = result - result.mean(0)
    for whole, made in ((scores, parts), (out, result)):
        if not bool((whole - made).abs().max() <= AGREE * whole.abs().max()):
            raise RcProbeError(
                "scores or results are not linear in the tokens (norms of queries and keys, gates), "
                "which the theorem does not cover",
                todo=NOT_COVERED,
            )
