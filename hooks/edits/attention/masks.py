"""Another attention mask: which keys each query may see, in place of the model's own.

The operands of the op are changed, never a weight. Padding stays out, and a query always sees itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rc_probe.hooks.edits.attention_interface import OpCall, RunOp
from rc_probe.hooks.edits.block_mode import OpEdit
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import INTERFACE, AttentionOp, Block, Structure
from rc_probe.hooks.structure.tape import SDPA
from rc_probe.hooks.undo import unseen

from .pass_inputs import PassInputs

MASKED = -5000.0  # scores of a head may be lower
SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True)
class Sight:
    """Which keys a query sees: those that any of these lets it see. All count tokens.

    complete: all. left: itself and so many before it; None: all before it, with `causal`. window: so many to each side.
    sinks: the first so many real tokens.
    """

    complete: bool = False
    causal: bool = False
    window: int | None = None
    left: int | None = None
    sinks: int = 0

    def of(self, queries: int, keys: int, real: Tensor | None, ahead: bool, device: Any) -> Tensor:
        """(batch or 1, queries, keys) bool. The last query stands at the last key.

        real: (batch, keys), None if all are; ahead: whether the model itself looks at later tokens. Without `complete`
        a model that does not, still does not.
        """
        at = torch.arange(keys, device=device)
        back = at[keys - queries :, None] - at  # how far behind the query a key stands
        seen = torch.full_like(back, self.complete, dtype=torch.bool)
        if self.causal:
            seen |= back >= 0
        if self.window is not None:
            seen |= back.abs() <= self.window
        if self.left is not None:
            seen |= (back >= 0) & (back <= self.left)
        seen = seen[None]
        if self.sinks:
            place = at[None] + 1 if real is None else real.cumsum(-1)
            seen = seen | (place <= self.sinks)[:, None]
        if not (self.complete or ahead):
            seen = seen & (back >= 0)
        if real is not None:
            seen = seen & real[:, None]
        return seen | (back == 0)


@dataclass(frozen=True)
class Scores:
    """What an op makes of the scores before the softmax. seen: (batch or 1, heads or 1, queries, keys) bool.

    bias: what is added to them where `seen`, None for nothing; given: whether its argument is additive
    """

    seen: Tensor
    bias: Tensor | None


def own_mask(call: OpCall, heads: int) -> Scores:
    """The mask that a call brings. Where it takes the softmax itself, what is left of its scores."""
    if call.via == "softmax":
        scores = apart(_first(call), heads)
        return Scores(_above(scores), scores)
    query, key, mask, causal = _operands(call)
    query, key = apart(query, heads), apart(key, heads)
    if mask is None:
        every = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
        return Scores((every.tril(key.shape[-2] - query.shape[-2]) if causal else every)[None, None], None)
    mask = mask[..., : key.shape[-2]]
    mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    mask = mask.expand(*mask.shape[:2], query.shape[-2], key.shape[-2])  # one row may stand for all queries
    if mask.dtype == torch.bool:
        return Scores(mask, None)
    seen = _above(mask)
    return Scores(seen, mask if bool((mask.masked_fill(~seen, 0) != 0).any()) else None)


def looks_ahead(call: OpCall, heads: int, row: int) -> bool:
    """Whether a query of this sample, which has no padding, sees a later key."""
    seen = own_mask(call, heads).seen
    queries, keys = seen.shape[-2:]
    return bool(seen[row if len(seen) > 1 else 0].triu(keys - queries + 1).any())


def mask_edit(
    structure: Structure, block: Block, op: AttentionOp, sight: Sight, inputs: PassInputs
) -> OpEdit:
    """Run an op with what `sight` lets its queries see. Where that is what they see, the call is the model's own.

    Raises RcProbeError, when the model runs, where the op does not attend between the tokens of the stream, or its
    mask cannot be told from its position biases.
    """

    def edit(call: OpCall, run: RunOp) -> Any:
        with torch.no_grad(), unseen():
            call = changed(call)
        return run(call)

    def changed(call: OpCall) -> OpCall:
        own = own_mask(call, op.heads)
        rows, queries, keys, device = *_sizes(call, op.heads), own.seen.device
        real = inputs.real(block, rows, queries, keys, device)
        alive = None if real is None else real[:, None, keys - queries :, None]
        own_seen = own.seen.expand(rows, -1, queries, keys)
        later = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(keys - queries + 1)
        ahead = bool((_live(own_seen, alive) & later).any()) or queries == 1
        seen = sight.of(queries, keys, real, ahead, device)[:, None]
        if torch.equal(*torch.broadcast_tensors(_live(own_seen, alive), _live(seen, alive))):
            return call
        if own.bias is not None and bool((_live(seen, alive) & ~own_seen).any()):
            why = "scores are seen" if call.via == "softmax" else "position biases come"
            raise structure.error(
                block, f"its {why} only where its own mask lets them, and the new one sees more",
                "Choose a mask that sees less than the model's own",
            )  # fmt: skip
        return _with_mask(call, seen, own.bias)

    return edit


def _live(seen: Tensor, alive: Tensor | None) -> Tensor:
    """Without what padding would see."""
    return seen if alive is None else seen & alive


def _with_mask(call: OpCall, seen: Tensor, bias: Tensor | None) -> OpCall:
    if call.via == "softmax":
        scores = _first(call)
        assert bias is not None
        masked = bias.masked_fill(~seen, torch.finfo(scores.dtype).min).reshape(scores.shape)
        return (
            replace(call, args=(masked, *call.args[1:]))
            if call.args
            else replace(call, kwargs={**call.kwargs, "input": masked})
        )
    query = _operands(call)[0]
    additive = bias is not None or (call.via == INTERFACE and call.implementation != "sdpa")
    mask = seen
    if additive:
        start = torch.zeros_like(seen, dtype=query.dtype) if bias is None else bias
        mask = start.masked_fill(~seen, torch.finfo(query.dtype).min)
    if call.via == INTERFACE:
        module, query, key, value, _, *rest = call.args
        given = {**call.kwargs, "is_causal": False} if "is_causal" in call.kwargs else call.kwargs
        return replace(call, args=(module, query, key, value, mask, *rest), kwargs=given)
    if query.ndim == 3 and mask.shape[1] == 1:
        mask = mask.expand(-1, len(query) // len(mask), -1, -1).flatten(0, 1)
    return replace(call, args=(), kwargs={**named(call), "attn_mask": mask, "is_causal": False})


def _operands(call: OpCall) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Query, key, mask, and whether it is causal where it has no mask."""
    if call.via == INTERFACE:
        module, query, key, _, mask, *_ = call.args
        if call.implementation not in {"eager", "sdpa"}:
            raise RcProbeError(
                f"the mask of {call.implementation!r} attention cannot be exchanged",
                where=type(module).__name__,
                todo="Load the model with attn_implementation='sdpa' or 'eager'",
            )
        causal = call.kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        return query, key, mask, bool(causal) and query.shape[-2] > 1 and call.implementation == "sdpa"
    assert call.via == SDPA
    given = named(call)
    return given["query"], given["key"], given.get("attn_mask"), bool(given.get("is_causal"))


def named(call: OpCall) -> dict[str, Any]:
    """The arguments of a call of `scaled_dot_product_attention` by their names."""
    return {**dict(zip(SDPA_NAMES, call.args, strict=False)), **call.kwargs}


def _first(call: OpCall) -> Tensor:
    scores: Tensor = call.args[0] if call.args else call.kwargs["input"]
    return scores


def _sizes(call: OpCall, heads: int) -> tuple[int, int, int]:
    """Samples, queries, keys."""
    if call.via == "softmax":
        scores = apart(_first(call), heads)
        return scores.shape[0], scores.shape[-2], scores.shape[-1]
    query, key, *_ = _operands(call)
    query = apart(query, heads)
    return query.shape[0], query.shape[-2], key.shape[-2]


def apart(x: Tensor, heads: int) -> Tensor:
    """With the heads on an axis of their own."""
    return x.unflatten(0, (-1, max(1, heads))) if x.ndim == 3 else x


def _above(x: Tensor) -> Tensor:
    """Where (batch, heads, queries, keys) is not what masked entries are: -inf, the least number, or in all heads -10,000."""
    masked = (x < MASKED).all(1, keepdim=True) | (x < torch.finfo(x.dtype).min / 4)
    return ~masked
