"""The attention op of each branch: taken over where that is proved exact, and its patterns handed on.

An op is owned by the library's attention interface where a pass with the interface owned is bitwise
the plain one and the op runs inside a call of it; else the `softmax` or `scaled_dot_product_attention`
call itself is intercepted. `AttentionOp.via` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.operator_rules import attention_pattern, attention_scores
from rc_probe.hooks.structure.structure import INTERFACE, AttentionOp, Block, Branch, Structure
from rc_probe.hooks.structure.tape import SDPA
from rc_probe.hooks.undo import unseen

from .attention.masks import own_mask
from .attention_interface import OpCall, implementation
from .block_mode import OpWatch
from .edits import Editing, Edits

OnPattern = Callable[[Block, Branch, Tensor], None]
OnMask = Callable[[Block, Branch, Tensor], None]
EAGER_TODO = "Load the model with attn_implementation='eager'"


# ---- patterns


def patterns(structure: Structure, on_pattern: OnPattern, on_mask: OnMask | None = None) -> Editing:
    """A context that hands on each attention pattern as the model runs: on_pattern(block, branch, P).

    P is (batch, heads, queries, keys), detached, of queries' heads where keys are shared by groups, and
    with windows or patches counted in the batch where the model attends within them. It is the op as
    it ran, before gates of heads. A branch with several ops (two streams) hands on one after the other.
    The output of the model stays bitwise the same.

    By the interface, P is what the model's own eager function gives for the operands (in float32 if the
    model is in half precision and did not run eagerly); a query that may attend to nothing has a row of
    zeros. By interception it is the softmax itself, or computed from the arguments of
    scaled_dot_product_attention.

    on_mask(block, branch, seen), before it: which keys each query may see, (batch or 1, heads or 1, queries, keys) bool.

    Raises RcProbeError when a block's patterns cannot be seen, and, while the model runs, when rows do
    not sum to one (or less, with attention sinks) or P times the values is not what the op returned.
    """
    return Editing(structure, pattern_edits(structure, on_pattern, on_mask))


def pattern_edits(
    structure: Structure,
    on_pattern: OnPattern,
    on_mask: OnMask | None = None,
    *,
    blocks: Iterable[Block] | None = None,
) -> Edits:
    """The same as edits that change nothing, of these blocks (None: of all)."""
    edits = Edits()
    for block in structure.blocks if blocks is None else blocks:
        for branch in (b for b in block.branches if b.kind in ("attention", "cross")):
            if not branch.ops or any(op.heads == 0 for op in branch.ops):
                why = "their layout is not proved" if branch.ops else "no attention operation was seen"
                what = structure.unseen(f"its attention patterns cannot be seen: {why}")
                raise structure.error(block, what, EAGER_TODO)
            for op in branch.ops:
                edits.watch_op(block.index, op, _watch(structure, block, branch, op, on_pattern, on_mask))
    return edits


def _watch(
    structure: Structure,
    block: Block,
    branch: Branch,
    op: AttentionOp,
    on_pattern: OnPattern,
    on_mask: OnMask | None,
) -> OpWatch:
    def watch(call: OpCall, result: Any) -> None:
        with torch.no_grad(), unseen():
            try:
                pattern = _PATTERNS[call.via](call, result, op)
                seen = None if on_mask is None else own_mask(call, op.heads).seen
            except RcProbeError as error:
                raise structure.error(block, error.what, error.todo or EAGER_TODO) from error
            if on_mask is not None and seen is not None:
                on_mask(block, branch, seen)
            on_pattern(block, branch, pattern.detach())

    return watch


def _by_interface(call: OpCall, result: tuple[Tensor, Tensor | None], op: AttentionOp) -> Tensor:
    module, query, key, value, mask, *rest = call.args
    if call.kwargs.get("dropout"):
        raise RcProbeError(DROPOUT, todo="Call model.eval()")
    weights, empty = result[1], None
    if call.implementation != "eager":
        eager = implementation(module, "eager")
        if call.implementation != "sdpa" or eager is None:
            raise RcProbeError(f"its patterns cannot be had from {call.implementation!r}", todo=EAGER_TODO)
        query, key, value, mask, *rest = (_full(a) for a in (query, key, value, mask, *rest))
        kwargs = {name: _full(a) for name, a in call.kwargs.items()}
        mask, empty = _explicit(module, query, key, mask, kwargs)
        try:
            weights = eager(module, query, key, value, mask, *rest, **kwargs)[1]
        except Exception as error:  # the model's own, of any kind
            raise RcProbeError(f"its eager attention fails ({error})", todo=EAGER_TODO) from error
    if weights is None:
        raise RcProbeError("its eager attention returns no patterns", todo="Use another attn_implementation")
    if empty is not None:
        weights = weights.masked_fill(empty, 0)
    sinks = any(call.kwargs.get(name) is not None for name in ("s_aux", "sinks")) or hasattr(module, "sinks")
    value = value.repeat_interleave(weights.shape[1] // value.shape[1], 1)
    _prove(weights, value, result[0].transpose(1, 2), sinks)
    return weights


def _explicit(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores where SDPA took `mask`, and which queries may attend to nothing.

    As the library has it: without a mask, several queries are causal unless an argument or the module
    says otherwise; with a position bias, masked scores get the least number in place of -inf.
    """
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and causal and query.shape[2] > 1:
        mask = query.new_ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask, None
    if kwargs.get("position_bias") is not None:
        return _additive(mask, query, torch.finfo(query.dtype).min), None
    return _additive(mask, query, -torch.inf), ~mask.any(-1, keepdim=True)


def _additive(mask: Tensor, like: Tensor, least: float) -> Tensor:
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, least)


def _by_sdpa(call: OpCall, result: Tensor, op: AttentionOp) -> Tensor:
    return _sdpa(*call.args, **call.kwargs, result=result, heads=op.heads)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    result: Tensor,
    heads: int,
) -> Tensor:
    """The pattern of a torch scaled_dot_product_attention, whose arguments these are."""
    if dropout_p:
        raise RcProbeError(DROPOUT, todo="Call model.eval()")
    query, key, value, mask = (_full(a) for a in (query, key, value, attn_mask))
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    weights = attention_pattern(attention_scores(query, key, mask, is_causal, scale))
    _prove(weights, value, result, sinks=False)
    return _unfolded(weights, heads)


def _by_softmax(call: OpCall, result: Tensor, op: AttentionOp) -> Tensor:
    axis = call.kwargs["dim"] if "dim" in call.kwargs else call.args[1]
    if axis % result.ndim != result.ndim - 1:
        raise RcProbeError("its softmax is not over the last axis", todo="Its patterns cannot be seen")
    return _unfolded(result, op.heads)


_PATTERNS: dict[str, Callable[[OpCall, Any, AttentionOp], Tensor]] = {
    INTERFACE: _by_interface, SDPA: _by_sdpa, "softmax": _by_softmax,
}  # fmt: skip
DROPOUT = "dropout is on in its attention, so that its patterns are random"


def _full(x: Any) -> Any:
    """A tensor in at least float32: fused attention computes its scores so, eager attention would not."""
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize < 4:
        return x.float()
    return x


def _unfolded(weights: Tensor, heads: int) -> Tensor:
    return weights.unflatten(0, (-1, heads)) if weights.ndim == 3 else weights


def _prove(weights: Tensor, value: Tensor, out: Tensor, sinks: bool) -> None:
    """Refuse a pattern (…, T, S) that is not what the op applied to the values to give `out` (…, T, d)."""
    weights, value = _full(weights), _full(value)
    tolerance = max(1e-5, 4 * torch.finfo(out.dtype).eps)
    sums = weights.sum(-1)
    one = (sums - 1).abs() <= tolerance
    if not (one | (sums == 0) | (sinks & (sums < 1))).all():
        raise RcProbeError("rows of its attention patterns do not sum to one", todo=EAGER_TODO)
    values = value[..., : weights.shape[-1], :]
    if not ((weights @ values - out).abs() <= tolerance * values.abs().amax()).all():
        raise RcProbeError("its attention patterns do not give what its attention returned", todo=EAGER_TODO)
