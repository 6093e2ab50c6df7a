"""One observed forward pass: which tensor was computed from which, by what, inside which module call.

The tape stores no values. Every tensor that an operation returns is a node; sets of nodes are
integers used as bit sets, so that "was this computed from that" is one `&`.

Three sets per node, filled in as the pass runs:

* `above`: the node and all it was computed from;
* `far`: what it was computed from through at least one heavy operation (a matmul, a convolution …);
* `carried`: what it still carries as it was: the chain back through views, casts, scalings, norms
  and the skip operand of every residual add. A residual add is an add one operand of which was
  computed, through a heavy operation, from what the other carries.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from rc_probe.hooks.module_calls import Call as MakeCall
from rc_probe.hooks.module_calls import around_calls, hooked
from rc_probe.hooks.undo import hook

Place = tuple[Any, ...]  # keys and indices, from the outside in, of a tensor in nested arguments

ADDS = {"add", "__add__", "__radd__", "__iadd__", "add_"}
SDPA = "scaled_dot_product_attention"
MHA = "multi_head_attention_forward"  # of nn.MultiheadAttention: projections and all
HEAVY = {
    "linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "addbmm",
    "einsum", "tensordot", "dot", "mv", "inner", "outer", "chain_matmul",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d", "_grouped_mm", "grouped_mm", "_scaled_mm",
    "cumsum", "cumprod", "lstm", "gru", SDPA, MHA, "opaque",
}  # fmt: skip
PRODUCTS = {SDPA, "matmul", "bmm", "baddbmm", "einsum", "__matmul__", "grid_sample"}  # the last: deformable
KEEPS_FIRST = {
    "view", "reshape", "view_as", "reshape_as", "transpose", "swapaxes", "permute", "movedim", "t", "contiguous",
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "clone", "detach", "dropout", "dropout_",
    "squeeze", "unsqueeze", "flatten", "unflatten", "expand", "expand_as", "__getitem__", "narrow", "select",
    "index_select", "roll", "pad", "nan_to_num", "clamp", "requires_grad_", "masked_fill", "masked_fill_",
    "unbind", "chunk", "split", "alias", "cpu", "cuda", "flip", "__setitem__", "__get__", "zeropad",
}  # fmt: skip
SHAPE_ONLY = {
    "expand_as",
    "view_as",
    "reshape_as",
    "type_as",
}  # take nothing of the second tensor but its form
FILLED = {
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
    "new_zeros", "new_ones", "new_empty", "new_full",
}  # fmt: skip
NORMS = {"layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm"}
SCALES = {
    "mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply", "div", "div_", "__truediv__", "__itruediv__",
    "true_divide", "sub", "sub_", "__sub__", "__isub__", "neg", "__neg__", "where", *ADDS,
}  # fmt: skip


@dataclass(slots=True, eq=False)
class Node:
    index: int
    op: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    call: int  # innermost module call, index into Tape.calls
    above: int
    far: int
    carried: int
    keeps: int = -1  # the input that it carries on, -1 if none
    norm: bool = False
    operands: tuple[int, int] | None = None  # the two tensor operands of an add, in order
    skip: int = -1  # 0 or 1: the operand that is the skip, if it is a residual add
    where: str = ""

    @property
    def bit(self) -> int:
        return 1 << self.index


@dataclass(slots=True, eq=False)
class Call:
    index: int
    parent: int
    module: nn.Module
    name: str
    turn: int  # its number among the calls of this module in the pass, from 0
    first: int  # nodes first … last were made during the call
    last: int = -1
    args: dict[Place, int] = field(default_factory=dict)
    outputs: dict[Place, int] = field(default_factory=dict)


def walk(value: Any, place: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """The tensors in nested tuples, lists and dicts (a ModelOutput is one), with their places."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, (*place, key))
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from walk(item, (*place, i))


class Tape(TorchFunctionMode):
    """Record one forward pass of `model`. Use `with Tape(model) as tape: model(**inputs)`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.nodes: list[Node] = []
        self.calls: list[Call] = []
        self._stack: list[int] = []
        self._node_of: dict[int, int] = {}
        self._alive: list[Tensor] = []  # ids stay unique only while the tensors live
        self._turns: dict[nn.Module, int] = {}
        self._paused = 0  # inside of hooks
        self._exit = ExitStack()

    # -- module calls -------------------------------------------------------------------------
    def __enter__(self) -> Tape:
        self._names = {module: name for name, module in self.model.named_modules()}
        self._exit.enter_context(around_calls(self._names, self._around))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """Off again, if it is on: does no harm a second time."""
        if self in _get_current_function_mode_stack():
            super().__exit__(None, None, None)
        self._exit.close()
        self._node_of.clear()
        self._alive.clear()

    def _around(self, module: nn.Module, call: MakeCall, args: Any, kwargs: Any) -> Any:
        """What hooks make of a tensor takes its place: it is no doing of the module, nor of what calls it."""
        if not hooked(module):
            self._enter_call(module, args, kwargs)
            output = call()
            self._leave_call(output)
            return output
        made: list[Any] = []

        def enter(module: nn.Module, new_args: Any, new_kwargs: Any) -> None:
            self._paused -= 1
            self._stand_for((args, kwargs), (new_args, new_kwargs))
            self._enter_call(module, new_args, new_kwargs)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._leave_call(output)
            made.append(output)
            self._paused += 1

        with ExitStack() as stack:
            stack.enter_context(hook(module.register_forward_pre_hook, enter, with_kwargs=True))
            stack.enter_context(hook(module.register_forward_hook, leave, prepend=True))
            self._paused += 1
            output = call()
            self._paused -= 1
        self._stand_for(made[0], output)
        return output

    def _stand_for(self, before: Any, after: Any) -> None:
        known = {place: self._node_of.get(id(tensor)) for place, tensor in walk(before)}
        for place, tensor in walk(after):
            node = known.get(place)
            if node is not None and id(tensor) not in self._node_of:
                self._node_of[id(tensor)] = node
                self._alive.append(tensor)

    def _enter_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        turn = self._turns.get(module, 0)
        self._turns[module] = turn + 1
        parent = self._stack[-1] if self._stack else -1
        call = Call(len(self.calls), parent, module, self._names[module], turn, len(self.nodes))
        for place, tensor in walk((args, kwargs)):
            known = self._node_of.get(id(tensor))
            call.args[place] = known if known is not None else self._add("input", tensor, ())
        self.calls.append(call)
        self._stack.append(call.index)

    def _leave_call(self, output: Any) -> None:
        call = self.calls[self._stack.pop()]
        for place, tensor in walk(output):
            known = self._node_of.get(id(tensor))
            if known is None and isinstance(tensor, nn.Parameter):
                known = self._add("input", tensor, ())
            elif known is None:  # made by code that the tape cannot see: the module stands for it
                known = self._add("opaque", tensor, tuple(call.args.values()))
            call.outputs[place] = known
        call.last = len(self.nodes) - 1

    # -- operations ---------------------------------------------------------------------------
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        op = _name(func)
        given = () if op in FILLED else args[:1] if op in SHAPE_ONLY else (args, kwargs)
        inputs = [self._node_of[id(t)] for _, t in walk(given) if id(t) in self._node_of]
        add_of = self._add_operands(op, args) if op in ADDS else None
        out = func(*args, **kwargs)
        if op == "__get__":  # attributes such as .shape or .data: only tensors matter
            op = "alias"
        if op == "__setitem__":
            self._rebind(args[0], self._add(op, args[0], tuple(inputs), args))
            return out
        if op == MHA:
            inputs.append(self._add_product(args))
        for _, tensor in walk(out):
            if op == "alias" and id(tensor) in self._node_of:
                continue
            index = self._add(op, tensor, tuple(inputs), args, add_of)
            self._rebind(tensor, index)
        return out

    def _add_operands(self, op: str, args: Any) -> tuple[int, int] | None:
        if len(args) < 2 or not (isinstance(args[0], Tensor) and isinstance(args[1], Tensor)):
            return None
        pair = [self._node_of.get(id(t)) for t in args[:2]]
        first, second = (
            self._add("input", t, ()) if n is None else n for n, t in zip(pair, args[:2], strict=True)
        )
        return (second, first) if op == "__radd__" else (first, second)

    def _add_product(self, args: Any) -> int:
        """The product that a fused attention makes of its query and key, each projected first."""
        sides = []
        for tensor in args[:2]:
            known = self._node_of.get(id(tensor))
            known = self._add("input", tensor, ()) if known is None else known
            sides.append(self._add("linear", tensor.detach(), (known,)))
        return self._add("matmul", args[0].detach(), tuple(sides))

    def _rebind(self, tensor: Tensor, index: int) -> None:
        """An operation in place gives the tensor, and what it is a view of, a new node."""
        self._node_of[id(tensor)] = index
        base = tensor._base
        if base is not None and _in_place(self.nodes[index].op) and id(base) in self._node_of:
            whole = self._add("__setitem__", base, (self._node_of[id(base)], index))
            self._node_of[id(base)] = whole

    def _add(
        self,
        op: str,
        tensor: Tensor,
        inputs: tuple[int, ...],
        args: Any = (),
        operands: tuple[int, int] | None = None,
    ) -> int:
        index = len(self.nodes)
        above = far = 0
        for i in inputs:
            above |= self.nodes[i].above
            far |= self.nodes[i].far
        if op in HEAVY or op.startswith("fft_"):
            far |= above
        call = self._stack[-1] if self._stack else -1
        node = Node(index, op, inputs, tuple(tensor.shape), call, above | 1 << index, far, 1 << index)
        self.nodes.append(node)
        node.operands = operands
        if operands is not None:
            node.skip = self._skip_operand(node)
            node.where = _source_line()
        node.keeps = self._kept_input(node, args)
        if node.keeps >= 0:
            node.carried |= self.nodes[node.keeps].carried
        self._node_of[id(tensor)] = index
        self._alive.append(tensor)
        return index

    def _skip_operand(self, node: Node) -> int:
        assert node.operands is not None
        p, q = (self.nodes[i] for i in node.operands)
        q_from_p = bool(q.far & p.carried) and p.shape == node.shape
        p_from_q = bool(p.far & q.carried) and q.shape == node.shape
        if q_from_p == p_from_q:
            return -1
        return 0 if q_from_p else 1

    def _kept_input(self, node: Node, args: Any) -> int:
        """Which input the node carries on unchanged but for shape, scale or normalisation."""
        if node.skip >= 0:
            assert node.operands is not None
            return node.operands[node.skip]
        first = self._node_of.get(id(args[0]), -1) if args and isinstance(args[0], Tensor) else -1
        if node.op in NORMS:
            node.norm = True
            return first
        if node.op in KEEPS_FIRST:
            return first
        if node.op in SCALES:
            full = [i for i in node.inputs if self.nodes[i].shape == node.shape]
            small = [i for i in node.inputs if self.nodes[i].shape != node.shape]
            if len(set(full)) > 1:  # a product of two streams, or a table added to one: the one that varies
                return -1
            if full:
                node.norm = any(self.nodes[i].above & self.nodes[full[0]].carried for i in small)
                return full[0]
        return -1


def _name(func: Any) -> str:
    """The operation's name; one of an extension, of which nothing is known, counts as opaque."""
    space = getattr(func, "namespace", None) or getattr(func, "_qualified_op_name", "aten::").split("::")[0]
    return "opaque" if space != "aten" else getattr(func, "__name__", str(func))


def _in_place(op: str) -> bool:
    return op.startswith("__i") or op == "__setitem__" or (op.endswith("_") and not op.startswith("__"))


def _source_line() -> str:
    """file:line of the innermost frame outside torch and this file, for error messages."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and name != __file__:
            return f"{name.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
