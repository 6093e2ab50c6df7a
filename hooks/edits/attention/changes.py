"""Another temperature, and other patterns: of one attention op, as functions of what enters and leaves it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rc_probe.hooks.edits.attention_interface import OpCall, RunOp
from rc_probe.hooks.edits.block_mode import OpEdit
from rc_probe.hooks.structure.structure import INTERFACE
from rc_probe.hooks.undo import unseen

from .masks import apart, named, own_mask


def temperature_edit(temperature: float) -> OpEdit:
    """The scaled scores are divided by it, before biases, soft caps and masks: their queries are."""

    def edit(call: OpCall, run: RunOp) -> Any:
        if temperature == 1:
            return run(call)
        with unseen():
            if call.via == INTERFACE:
                module, query, *rest = call.args
                colder = replace(call, args=(module, query / temperature, *rest))
            else:
                given = named(call)
                colder = replace(call, args=(), kwargs={**given, "query": given["query"] / temperature})
        return run(colder)

    return edit


def pattern_edit(heads: int, pattern: float, uniform: float) -> OpEdit:
    """The pattern A becomes `pattern` A + `uniform` J, J uniform over the keys that each query may see."""

    def edit(call: OpCall, run: RunOp) -> Any:
        result = run(call)
        with unseen():
            seen = own_mask(call, heads).seen
            share = seen / seen.sum(-1, keepdim=True).clamp_min(1)
            if call.via == "softmax":
                return result * pattern + (share * uniform).to(result.dtype).expand_as(
                    apart(result, heads)
                ).reshape(result.shape)
            value = call.args[3] if call.via == INTERFACE else named(call)["value"]
            out = result[0] if isinstance(result, tuple) else result
            even = _even(share, apart(value, heads), _queries(call, heads)).to(out.dtype)
            even = even.transpose(1, 2) if call.via == INTERFACE else even.reshape(out.shape)
            changed = out * pattern + even * uniform
        return (changed, *result[1:]) if isinstance(result, tuple) else changed

    return edit


def _even(share: Tensor, value: Tensor, heads: int) -> Tensor:
    """What uniform attention makes of the values, (batch, heads, queries, width)."""
    value = value.repeat_interleave(heads // value.shape[1], 1)
    return torch.matmul(share.to(value.dtype), value[..., : share.shape[-1], :])


def _queries(call: OpCall, heads: int) -> int:
    query = call.args[1] if call.via == INTERFACE else named(call)["query"]
    return int(apart(query, heads).shape[1])
