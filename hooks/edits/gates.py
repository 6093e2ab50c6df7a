"""Gates: which operands a component of a block is, and how to scale or remove it exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rc_probe.hooks.components import COMPONENTS
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import INTERFACE, AttentionOp, Block, Junction, Structure

from .block_mode import Function
from .edits import Edits, zero


@dataclass(frozen=True)
class Gate:
    """Scale `component` of the blocks by `value`: 1 keeps, 0 removes exactly.

    `blocks` are numbered from 1, as layers of the stream are (layer l is the stream after block l);
    None means every block that has the component. `heads`, from 1, only for the component `head`.
    `value` is a number, or a tensor (batch,) with one gate per sample.
    """

    component: str
    blocks: tuple[int, ...] | None = None
    heads: tuple[int, ...] = ()
    value: float | Tensor = 0.0

    def __post_init__(self) -> None:
        for name in ("blocks", "heads"):  # one number may stand for a tuple of one
            given = getattr(self, name)
            numbers = (given,) if isinstance(given, int) else given if given is None else tuple(given)
            whole = [isinstance(number, int) and not isinstance(number, bool) for number in numbers or ()]
            if not all(whole):
                raise _wrong(f"{name} {given!r} are not whole numbers", "Count from 1, such as (3, 4)")
            object.__setattr__(self, name, numbers)
        if self.component not in COMPONENTS:
            raise _wrong(f"there is no component {self.component!r}", f"There are {', '.join(COMPONENTS)}")
        if not isinstance(self.value, Tensor | int | float):
            raise _wrong(f"the value {self.value!r} is not a number", "Give a number, or a tensor (batch,)")
        numbers_of = self.value if isinstance(self.value, Tensor) else torch.tensor(self.value)
        if numbers_of.ndim > isinstance(self.value, Tensor) or not numbers_of.isfinite().all():
            raise _wrong(
                "the value is no finite number, or tensor (batch,) of such", "Give 0 to remove, 1 to keep"
            )


def scaling(value: float | Tensor, axis: int | None, ndim: int) -> Function:
    """The function that scales by `value` along the batch axis; zeros are exact, ones are bitwise."""
    if not isinstance(value, Tensor):
        number = float(value)
        return zero if number == 0 else (lambda x: x if number == 1 else x * number)
    if axis is None:
        raise ValueError("no batch axis")

    def scale(x: Tensor) -> Tensor:
        folded = x.ndim < ndim  # OPT folds batch and tokens into one axis for its MLP
        samples = x.shape[axis] // len(value) if folded else x.shape[axis]
        if (folded and x.shape[axis] % len(value)) or (not folded and samples != len(value)):
            raise _wrong_count(value, x.shape[axis])
        y = x.unflatten(axis, (len(value), -1)) if folded else x
        shape = [1] * y.ndim
        shape[axis] = -1
        g = value.to(y.device, y.dtype).reshape(shape)
        y = torch.where(g == 0, torch.zeros((), dtype=y.dtype, device=y.device), y * g)
        return y.flatten(axis, axis + 1) if folded else y

    return scale


def gate_edits(structure: Structure, gates: Sequence[Gate]) -> Edits:
    """The edits that set all `gates` at once.

    Raises RcProbeError when a block or head does not exist, or a block lacks the component.
    """
    edits = Edits()
    for gate in gates:
        for block in _blocks(structure, gate):
            if gate.component == "head":
                _gate_heads(structure, block, gate, edits)
            elif gate.component == "block":
                _leave_out(structure, block, gate, edits)
            else:
                _gate_part(structure, block, gate, edits)
    return edits


def _blocks(structure: Structure, gate: Gate) -> list[Block]:
    if gate.blocks is None:
        having = [b for b in structure.blocks if has_component(b, gate.component)]
        if not having:
            raise structure.error(
                structure.blocks[0],
                f"no block has {gate.component!r}; the blocks are {structure.signature}",
                "Choose another component",
            )
        return having
    return structure.numbered(gate.blocks)


def _kind(component: str) -> str:
    return "attention" if component == "head" else component.split(".", maxsplit=1)[0]


def has_component(block: Block, component: str) -> bool:
    if component in {"block", "skip"}:
        return True
    if component == "mlp.skip" and is_parallel(block):
        return False  # the one skip of a parallel block is the attention skip
    return any(b.kind == _kind(component) for b in block.branches)


def is_parallel(block: Block) -> bool:
    """Whether attention and MLP are added to the stream in one junction."""
    return any({"attention", "mlp"} <= {b.kind for b in j.branches} for j in block.junctions)


def _leave_out(structure: Structure, block: Block, gate: Gate, edits: Edits) -> None:
    if isinstance(gate.value, Tensor) or gate.value != 0:
        raise structure.error(
            block, "a whole block can only be removed (gate 0)", "Gate its branches instead"
        )
    edits.identity.add(block.index)


def _gate_part(structure: Structure, block: Block, gate: Gate, edits: Edits) -> None:
    if not has_component(block, gate.component):
        raise structure.error(
            block,
            f"it has no {gate.component!r}; its branches are {block.signature}",
            "Choose another component",
        )
    if isinstance(gate.value, Tensor) and block.batch_axis is None:
        raise structure.error(
            block, "its stream has no batch axis, so gates per sample cannot apply", "Use a number"
        )
    function = scaling(gate.value, block.batch_axis, block.ndim)
    kind = _kind(gate.component)
    for index, junction in enumerate(block.junctions):
        mine = [b for b in junction.branches if kind in {b.kind, "skip"}]
        if mine and gate.component.endswith("skip"):
            edits.at(junction.skip, function)
        elif mine and gate.component == "mlp.sublayer":
            _remove_sublayer(structure, block, index, junction, gate, edits)
        else:
            for branch in mine:
                edits.at(branch.site, function)


def _remove_sublayer(
    structure: Structure, block: Block, index: int, junction: Junction, gate: Gate, edits: Edits
) -> None:
    if isinstance(gate.value, Tensor) or gate.value != 0:
        raise structure.error(block, "a sublayer can only be removed (gate 0)", "Use 'mlp' for other gates")
    for branch in junction.branches:
        if branch.kind == "mlp":
            edits.at(branch.site, zero)
    if len(junction.branches) == 1 and junction.norms:
        if any(norm.turn < 0 for norm in junction.norms):
            raise structure.error(
                block,
                f"the norm after {junction.where} is not a module and cannot be left out",
                "Use 'mlp' instead",
            )
        edits.bypass.add((block.index, index))


def _gate_heads(structure: Structure, block: Block, gate: Gate, edits: Edits) -> None:
    if not has_component(block, "head"):
        raise structure.error(
            block,
            f"it has no heads: no branch is attention, its branches are {block.signature}",
            "Choose another component",
        )
    branches = [b for b in block.branches if b.kind == "attention" and b.ops]
    if not branches:
        raise structure.error(
            block,
            structure.unseen(
                "its heads cannot be gated: no softmax or scaled_dot_product_attention was seen in its attention branch"
            ),
            "Load the model with attn_implementation='eager' or 'sdpa'",
        )
    for branch in branches:
        count = branch.heads
        if not count:
            raise structure.error(
                block,
                structure.unseen("the heads of its attention operations cannot be told apart"),
                "Gate the whole branch instead",
            )
        for head in gate.heads:
            if not 1 <= head <= count:
                raise structure.error(block, f"there is no head {head}", f"Heads are numbered 1 to {count}")
        for op in branch.ops:
            edits.at_op(block.index, op, head_scaling(op, gate.heads, gate.value))


def head_scaling(op: AttentionOp, heads: Sequence[int], value: float | Tensor) -> Function:
    """Scale heads (from 1) of an attention op's output, laid out as AttentionOp says."""

    def scale(x: Tensor) -> Tensor:
        batch = len(x) // op.heads if x.ndim == 3 else len(x)
        g = torch.ones(batch, op.heads, dtype=x.dtype, device=x.device)
        if isinstance(value, Tensor) and len(value) != batch:
            raise _wrong_count(value, batch)
        for head in heads:
            g[:, head - 1] = value.to(g) if isinstance(value, Tensor) else value
        return weigh_heads(op, x, g)

    return scale


def weigh_heads(op: AttentionOp, x: Tensor, g: Tensor) -> Tensor:
    """An attention op's output with each head times its gate, g (batch, heads); zeros are exact."""
    folded = x.ndim == 3
    y = x.unflatten(0, (-1, op.heads)) if folded else x
    if len(g) != len(y):
        raise _wrong_count(g, len(y))
    g = g.to(y.device, y.dtype)
    g = g[:, None, :, None] if op.via == INTERFACE else g[:, :, None, None]
    y = torch.where(g == 0, torch.zeros((), dtype=y.dtype, device=y.device), y * g)
    return y.flatten(0, 1) if folded else y


def _wrong(what: str, todo: str) -> RcProbeError:
    return RcProbeError(what, where="Gate", todo=todo)


def _wrong_count(value: Tensor, batch: int) -> RcProbeError:
    return RcProbeError(
        f"{len(value)} gates were given for a batch of {batch}", where="gates per sample",
        todo="Give one gate for each sample of the batch that runs",
    )  # fmt: skip
