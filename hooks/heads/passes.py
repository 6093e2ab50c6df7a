"""Passes of the example in which what projections return is seen, or replaced by numbers that say which feature they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rc_probe.hooks.edits.attention.masks import apart, named, own_mask
from rc_probe.hooks.edits.attention_interface import OpCall, RunOp
from rc_probe.hooks.edits.edits import Editing, Edits
from rc_probe.hooks.errors import RcProbeError, reason
from rc_probe.hooks.structure.example_inputs import example_of, with_no_cache
from rc_probe.hooks.structure.structure import INTERFACE, AttentionOp, Block, Branch, Structure
from rc_probe.hooks.structure.tape import Tape
from rc_probe.hooks.undo import unseen

from .origins import Origins, origins

Vector = Callable[[int], Tensor]  # (features,) for how many features
DIGITS = {torch.bfloat16: 32, torch.float16: 128}  # how many whole numbers survive a scaling
QKV = ("query", "key", "value")


@dataclass
class Listened:
    """One attention op, and what was seen of it in a pass. Tensors of the op are (batch, heads, tokens, width).

    reads, returns: of the modules, by part; op: query, key and value as they enter it; biased: whether something is
    added to its scores
    """

    block: Block
    branch: Branch
    op: AttentionOp
    origins: Origins | None = None
    refused: str = ""
    nodes: dict[str, int] = field(default_factory=dict)
    reads: dict[str, Tensor] = field(default_factory=dict)
    returns: dict[str, Tensor] = field(default_factory=dict)
    op_got: dict[str, Tensor] = field(default_factory=dict)
    biased: bool = False


def listened(structure: Structure) -> list[Listened]:
    """The attention ops of all blocks, those that cannot be listened to with a reason, and where their operands come from."""
    found = []
    for block in structure.blocks:
        for branch in (b for b in block.branches if b.kind == "attention"):
            if len(branch.ops) == 1 and branch.ops[0].via != "softmax":
                found.append(Listened(block, branch, branch.ops[0]))
                continue
            seen = ", ".join(op.via for op in branch.ops) or "no softmax or scaled_dot_product_attention"
            found.append(
                Listened(block, branch, branch.ops[0] if branch.ops else NO_OP, refused=_why(branch, seen))
            )
    _trace(structure, [each for each in found if not each.refused])
    return found


NO_OP = AttentionOp(-1, "none", 0)


def _why(branch: Branch, seen: str) -> str:
    if len(branch.ops) > 1:
        return f"its attention has several operations ({seen})"
    if not branch.ops:
        return f"{seen} was seen in its attention"
    return f"its {seen} gets scores that are put together before, and no queries and keys"


def _trace(structure: Structure, ops: Sequence[Listened]) -> None:
    """One pass on a tape: the modules that make the operands of each op."""
    tape = Tape(structure.model)
    edits = Edits()
    for each in ops:
        edits.around_op(each.block.index, each.op, partial(_noted, tape, each))
    with tape, Editing(structure, edits):
        run_example(structure)
    for each in ops:
        try:
            if set(each.nodes) != {*QKV, "out"}:
                raise RcProbeError(f"what enters its {each.op.via} is made by code that is not seen")
            each.origins = origins(tape, each.block, each.branch, each.nodes)
        except RcProbeError as error:
            each.refused = error.what


def _noted(tape: Tape, each: Listened, call: OpCall, run: RunOp) -> Any:
    result = run(call)
    out = result[0] if isinstance(result, tuple) else result
    each.nodes = {
        part: tape._node_of[id(tensor)]
        for part, tensor in zip((*QKV, "out"), (*operands(call), out), strict=True)
        if id(tensor) in tape._node_of
    }
    return result


def operands(call: OpCall) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a call that has them."""
    if call.via == INTERFACE:
        return call.args[1], call.args[2], call.args[3]
    given = named(call)
    return given["query"], given["key"], given["value"]


def listen(structure: Structure, ops: Iterable[Listened], give: Vector | None = None) -> None:
    """A pass of the example, seen by `ops`. give: what projections, and ops by head, return at every token instead."""
    edits = Edits()
    for each in (one for one in ops if one.origins is not None and not one.refused):
        places = each.origins
        assert places is not None
        by_place: dict[Any, list[str]] = {}
        for part in QKV:
            by_place.setdefault(getattr(places, part), []).append(part)
        if places.out is not None:
            by_place.setdefault(places.out, []).append("out")
        for place, parts in by_place.items():
            replaced = give if "out" not in parts else None
            edits.at_module(
                each.block.index, place.name, place.turn, partial(_see, each, tuple(parts), replaced)
            )
        edits.around_op(each.block.index, each.op, partial(_see_op, each, give))
    with Editing(structure, edits):
        run_example(structure)


def _see(each: Listened, parts: tuple[str, ...], give: Vector | None, x: Tensor, y: Tensor) -> Tensor:
    with unseen():
        for part in parts:
            each.reads[part], each.returns[part] = x.detach().clone(), y.detach().clone()
        return y if give is None else give(y.shape[-1]).to(y).expand_as(y).clone()


def _see_op(each: Listened, give: Vector | None, call: OpCall, run: RunOp) -> Any:
    result = run(call)
    with unseen():
        heads = each.op.heads
        for part, tensor in zip(QKV, operands(call), strict=True):
            each.op_got[part] = apart(tensor, heads).detach().double()
        each.biased = each.biased or _biased(call, heads)
        if give is None:
            return result
        out = result[0] if isinstance(result, tuple) else result
        by_token = call.via == INTERFACE  # (batch, tokens, heads, width)
        wide = out if by_token else apart(out, heads)
        size = (wide.shape[2] if by_token else wide.shape[1], wide.shape[-1])
        code = give(size[0] * size[1]).to(out).reshape(size)
        new = (code if by_token else code[:, None]).expand_as(wide).reshape(out.shape).clone()
    return (new, *result[1:]) if isinstance(result, tuple) else new


def _biased(call: OpCall, heads: int) -> bool:
    if call.kwargs.get("position_bias") is not None:
        return True
    try:
        return own_mask(call, heads).bias is not None
    except RcProbeError:
        return False


def run_example(structure: Structure) -> None:
    """The model on the example; without its head where that cannot read it."""
    model = structure.model
    runs: list[nn.Module] = [model, getattr(model, "base_model", model)]
    for number, runner in enumerate(runs):
        try:
            runner(**with_no_cache(runner, example_of(structure)))
            return
        except Exception as error:  # the model's own, of any kind
            if number + 1 == len(runs) or runs[0] is runs[1]:
                what = f"its example cannot be run again ({reason(error)})"
                raise RcProbeError(what, where=type(model).__name__, todo="Attach again") from error


def base_of(dtype: torch.dtype) -> int:
    """How many features one pass tells apart."""
    return DIGITS.get(dtype, 4096)


def digits(base: int, place: int, features: int) -> Tensor:
    """One digit of the numbers 0, 1, … of all features."""
    return torch.arange(features).div(base**place, rounding_mode="floor").remainder(base).double()


def ones(features: int) -> Tensor:
    return torch.ones(features, dtype=torch.float64)


def noise(seed: int, features: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(features, dtype=torch.float64, generator=generator) + 0.5


def coded(dtype: torch.dtype, features: int) -> Iterator[Vector]:
    """What tells so many features apart: one digit of their numbers a pass."""
    base, place = base_of(dtype), 0
    while base**place < features:
        yield partial(digits, base, place)
        place += 1
