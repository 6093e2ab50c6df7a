"""What runs while a block with edits runs: counts its adds and attention ops, and edits the chosen ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.module_calls import hooked, in_hook
from rc_probe.hooks.structure.structure import CandidateBlock, form, is_attention_op
from rc_probe.hooks.structure.tape import ADDS, SDPA, walk

from .attention_interface import OpCall, RunOp, running
from .block_watch import replace
from .model_state import grad_mode

Function = Callable[[Tensor], Tensor]
OpEdit = Callable[[OpCall, RunOp], Any]  # runs the op by its second argument, on any operands; its result
OpWatch = Callable[[OpCall, Any], None]  # the op as it ran, and its result before any edit of that
ModuleEdit = Callable[[Tensor, Tensor], Tensor]  # of what a module reads and what it gives: what is to go on
ModuleWatch = Callable[[Tensor, Tensor], None]
ModuleKey = tuple[
    int, str, int
]  # block, name of the module, its turn among the calls of the module in the block
OpKey = tuple[bool, int]  # whether by the interface, and its number among these
ATTENTION_OPS = {SDPA, "softmax"}
IN_PLACE = {"add_", "__iadd__"}
WIDE = 4  # bytes of the floats that norms are computed in, at least


@dataclass
class Plan:
    """The edits of one block, looked up once for all its calls."""

    operands: dict[int, list[tuple[int, Function]]] = field(default_factory=dict)  # by ordinal of the add
    ops: dict[OpKey, OpEdit] = field(default_factory=dict)
    watches: dict[OpKey, OpWatch] = field(default_factory=dict)
    norms: dict[tuple[nn.Module, int], ModuleEdit] = field(default_factory=dict)  # by module and turn
    norm_watches: dict[tuple[nn.Module, int], list[ModuleWatch]] = field(default_factory=dict)
    outputs: dict[tuple[nn.Module, int], ModuleEdit] = field(
        default_factory=dict
    )  # the same of other modules
    modules: set[nn.Module] = field(default_factory=set)  # of the block, where the interface is owned
    inside: tuple[nn.Module, ...] = ()  # the block's modules

    @property
    def routed(self) -> bool:
        return any(routed for routed, _ in (*self.ops, *self.watches))


@dataclass(frozen=True)
class Routed:
    """A call of the interface in a block call: which softmax and attention ops it made, how many heads.

    `heads` is 0 where the output is not (batch, tokens, heads, dim) with the heads of the queries.
    """

    first: int
    last: int
    heads: int


class BlockMode(TorchFunctionMode):
    """Counts the adds and attention ops of one block call, and edits the chosen ones."""

    def __init__(self, block: CandidateBlock, plan: Plan) -> None:
        super().__init__()
        self.block, self.plan = block, plan
        self.adds = self.ops = 0
        self.hooked = any(map(hooked, plan.inside))
        self.autograd = grad_mode()
        self.routed: list[Routed] = []
        self.turns: dict[nn.Module, int] = {}  # of modules inside, as far as they are edited
        self.edited = 0  # modules inside whose outputs were

    def __enter__(self) -> BlockMode:
        running.listeners.append(self)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """Off again, if it is on: does no harm a second time."""
        if self in running.listeners:
            running.listeners.remove(self)
        if self in _get_current_function_mode_stack():
            super().__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ATTENTION_OPS:
            return self._attention_op(name, func, args, kwargs or {})
        if name in ADDS:
            args = self._edit_add(name, args)
        return func(*args, **(kwargs or {}))

    def checked(self, edit: Any) -> Any:
        """The edit, if the backward pass will see it: what a block checkpoints itself is run again without hooks."""
        if self.autograd != grad_mode() and self.autograd[0]:
            raise RcProbeError(
                "gradient checkpointing inside the block would recompute it without its gates, and the gradients "
                "would be wrong",
                where=f"block {self.block.index + 1} ({self.block.name})",
                todo="Call model.gradient_checkpointing_disable(), or run under torch.no_grad()",
            )
        return edit

    # -- attention ops ------------------------------------------------------------------------
    def _attention_op(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        if not is_attention_op(name, first.shape) or (self.hooked and in_hook()):
            return func(*args, **kwargs)
        edit = self.plan.ops.get((False, self.ops))
        call = OpCall(name, func, args, kwargs)
        out = self._run(call) if edit is None else self.checked(edit)(call, self._run)
        self.ops += 1
        return out

    def _run(self, call: OpCall) -> Any:
        out = call.run()
        if running.listeners[0] is self:  # the last that gets the call: no other edits it any more
            for listener in running.listeners:
                watch = listener.plan.watches.get((False, listener.ops))
                if watch is not None:
                    watch(call, out)
        return out

    def holds(self, module: nn.Module) -> bool:
        return module in self.plan.modules

    def edit_routed(self, call: OpCall, run: RunOp) -> Any:
        edit = self.plan.ops.get((True, len(self.routed)))
        first = self.ops
        result = run(call) if edit is None else self.checked(edit)(call, run)
        out, query = result[0], call.args[1]
        fits = out.ndim == query.ndim == 4 and out.shape[2] == query.shape[1]
        self.routed.append(Routed(first, self.ops, out.shape[2] if fits else 0))
        return result

    def watch_routed(self, call: OpCall, result: Any) -> None:
        watch = self.plan.watches.get((True, len(self.routed)))
        if watch is not None:
            watch(call, result)

    # -- norms ----------------------------------------------------------------------------------
    def through_norm(self, call: tuple[nn.Module, int], x: Any, output: Any) -> Any:
        """What a norm gives, watched and edited. x: what it reads; call: its module and turn."""
        edit, watches = self.plan.norms.get(call), self.plan.norm_watches.get(call, [])
        if edit is None and not watches:
            return output
        place, out = next(walk(output))  # some return a scale of a number format beside it
        wide = x if x.dtype.itemsize >= WIDE else x.float()
        for watch in watches:
            watch(wide, out)
        return output if edit is None else replace(output, place, self.checked(edit)(wide, out).to(out.dtype))

    # -- adds ---------------------------------------------------------------------------------
    def _edit_add(self, name: str, args: Any) -> Any:
        if len(args) < 2 or not (isinstance(args[0], Tensor) and isinstance(args[1], Tensor)):
            return args
        a, b = args[:2]
        axis = self.block.add_axis
        if not a.ndim or not b.ndim or max(form(a.shape, axis), form(b.shape, axis)) not in self.block.forms:
            return args
        if self.hooked and in_hook():
            return args
        edits = self.plan.operands.get(self.adds)
        self.adds += 1
        if edits is None:
            return args
        pair = [b, a] if name == "__radd__" else [a, b]
        for operand, function in edits:
            edited = self.checked(function)(pair[operand])
            if operand == 0 and name in IN_PLACE:
                pair[0].copy_(edited)  # the model goes on with this very tensor
            else:
                pair[operand] = edited
        return ((pair[1], pair[0]) if name == "__radd__" else tuple(pair)) + tuple(args[2:])
