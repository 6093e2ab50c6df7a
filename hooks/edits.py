"""Edits: functions applied to one operand of one add, to an attention op's output, or past a norm.

An edit never touches weights. While a block with edits runs, a TorchFunctionMode counts the adds of
stream shape and hands the chosen operand through its function before the real add is run; the real
add keeps dtype and layout as the model made them. Outside these blocks nothing is intercepted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import RcProbeError
from .state import eager, grad_mode, recomputing
from .structure import Block, NormAfter, Site, Structure, is_attention_op
from .tape import ADDS, SDPA, Path

Function = Callable[[Tensor], Tensor]
ATTENTION_OPS = {SDPA, "softmax"}
IN_PLACE = {"add_", "__iadd__"}


@dataclass
class Edits:
    """What to do where. Several edits at one place are applied in the order in which they came."""

    operands: dict[Site, Function] = field(default_factory=dict)
    ops: dict[tuple[int, int], Function] = field(default_factory=dict)  # (block, attention op) -> output edit
    bypass: set[tuple[int, int]] = field(default_factory=set)  # (block, junction) whose norms are left out

    def at(self, site: Site, function: Function) -> None:
        self.operands[site] = _then(self.operands.get(site), function)

    def at_op(self, block: int, ordinal: int, function: Function) -> None:
        self.ops[block, ordinal] = _then(self.ops.get((block, ordinal)), function)

    @property
    def blocks(self) -> set[int]:
        return {s.block for s in self.operands} | {b for b, _ in self.ops} | {b for b, _ in self.bypass}


def _then(first: Function | None, second: Function) -> Function:
    return second if first is None else lambda x: second(first(x))


def zero(x: Tensor) -> Tensor:
    """The edit that removes an operand exactly."""
    return torch.zeros_like(x)


class _BlockMode(TorchFunctionMode):
    """Counts the adds and attention ops of one block call, and edits the chosen ones."""

    def __init__(self, block: Block, edits: Edits) -> None:
        super().__init__()
        self.block = block
        self.adds = self.ops = 0
        self.autograd = grad_mode()
        self.operands: dict[int, list[tuple[int, Function]]] = {}
        for site, function in edits.operands.items():
            if site.block == block.index:
                self.operands.setdefault(site.ordinal, []).append((site.operand, function))
        self.op_edits = {o: f for (b, o), f in edits.ops.items() if b == block.index}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ADDS:
            args = self._edit_add(name, args)
        out = func(*args, **(kwargs or {}))
        if name in ATTENTION_OPS and is_attention_op(name, out.shape):
            edit = self.op_edits.get(self.ops)
            self.ops += 1
            return out if edit is None else self._checked(edit)(out)
        return out

    def _checked(self, edit: Function) -> Function:
        """The edit, if the backward pass will see it: what a block checkpoints itself is run again without hooks."""
        if self.autograd != grad_mode() and self.autograd[0]:
            raise RcProbeError(
                "gradient checkpointing inside the block would recompute it without its gates, and the gradients "
                "would be wrong",
                where=f"block {self.block.index + 1} ({self.block.name})",
                todo="Call model.gradient_checkpointing_disable(), or run under torch.no_grad()",
            )
        return edit

    def _edit_add(self, name: str, args: Any) -> Any:
        if len(args) < 2 or not (isinstance(args[0], Tensor) and isinstance(args[1], Tensor)):
            return args
        a, b = args[:2]
        if (
            not a.ndim
            or not b.ndim
            or (max(a.ndim, b.ndim), max(a.shape[-1], b.shape[-1])) not in self.block.forms
        ):
            return args
        edits = self.operands.get(self.adds)
        self.adds += 1
        if edits is None:
            return args
        pair = [b, a] if name == "__radd__" else [a, b]
        for operand, function in edits:
            edited = self._checked(function)(pair[operand])
            if operand == 0 and name in IN_PLACE:
                pair[0].copy_(edited)  # the model goes on with this very tensor
            else:
                pair[operand] = edited
        return ((pair[1], pair[0]) if name == "__radd__" else tuple(pair)) + tuple(args[2:])


class BlockWatch(AbstractContextManager["BlockWatch"]):
    """Knows which block call is running: calls `enter(block, args, kwargs)` and `leave(block, output)`.

    A module that is called several times in a pass (ALBERT) is told apart by its turn; turns start
    anew whenever a module that contains all blocks is called. `leave` gets None when the block
    raised. Hooks are removed when the context closes, whatever happened.
    """

    def __init__(self, structure: Structure, indices: Iterable[int]) -> None:
        self.structure = structure
        self.model = structure.model  # the structure alone keeps no model alive
        self.wanted = set(indices)
        self._thread = threading.get_ident()
        self.forced: int | None = None  # a replay says itself which block call it stands for
        self._turns: dict[nn.Module, int] = {}
        self._running: list[Block | None] = []
        self._exit = ExitStack()

    def enter(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """May return new (args, kwargs)."""

    def leave(self, block: Block, output: Any) -> None: ...

    def __enter__(self) -> BlockWatch:
        by_module: dict[nn.Module, list[Block]] = {}
        for block in self.structure.blocks:
            by_module.setdefault(self.structure.module(block), []).append(block)
        self._exit.enter_context(eager())
        self._exit.callback(self._running.clear)
        for module, calls in by_module.items():
            if any(b.index in self.wanted for b in calls):
                self._hook(module.register_forward_pre_hook(self._before(calls), with_kwargs=True))
                self._hook(module.register_forward_hook(self._after, prepend=True, always_call=True))
        for name in self.structure.ancestors:
            self._hook(self.model.get_submodule(name).register_forward_pre_hook(self._reset))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._exit.close()

    def _hook(self, handle: Any) -> None:
        self._exit.callback(handle.remove)

    def _reset(self, module: nn.Module, args: Any) -> None:
        self._turns.clear()

    def _before(self, calls: list[Block]) -> Callable[..., Any]:
        by_turn = {b.turn: b for b in calls}

        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if threading.get_ident() != self._thread and not recomputing():  # autograd has threads of its own
                raise self.structure.error(
                    calls[0],
                    "it is run by another thread than the one that opened the context",
                    "Use one thread: open the context in the thread that runs the model",
                )
            turn = self._turns.get(module, 0)
            self._turns[module] = turn + 1
            block = calls[0] if len(calls) == 1 else by_turn.get(turn % len(by_turn))
            if self.forced is not None:
                block = self.structure.blocks[self.forced]
            if block is not None and block.index not in self.wanted:
                block = None
            self._running.append(block)
            return self.enter(block, args, kwargs) if block is not None else None

        return hook

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        block = self._running.pop() if self._running else None
        if block is not None:
            self.leave(block, output)


class Editing(BlockWatch):
    """Context in which the model runs with `edits`. The model is as before when it closes."""

    def __init__(self, structure: Structure, edits: Edits) -> None:
        super().__init__(structure, edits.blocks)
        self.edits = edits
        self._modes: list[_BlockMode] = []
        self._norm_turns: dict[nn.Module, int] = {}

    def __enter__(self) -> Editing:
        super().__enter__()
        norms = {n.name for b, j in self.edits.bypass for n in self.structure.blocks[b].junctions[j].norms}
        for name in norms:
            module = self.model.get_submodule(name)
            self._hook(module.register_forward_hook(self._pass_norm, with_kwargs=True))
        self._exit.callback(self._close_modes)
        return self

    def enter(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recomputing() and sum(b.name == block.name for b in self.structure.blocks) > 1:
            raise self.structure.error(
                block,
                "gradient checkpointing recomputes a module that is called several times, and the gates of which "
                "call cannot be told",
                "Run it without gradient checkpointing",
            )
        self._norm_turns.clear()
        mode = _BlockMode(block, self.edits)
        mode.__enter__()
        self._modes.append(mode)

    def leave(self, block: Block, output: Any) -> None:
        mode = self._modes.pop()
        mode.__exit__(None, None, None)
        if output is not None and (mode.adds, mode.ops) != (block.adds, block.attention_ops):
            raise self.structure.error(
                block,
                f"this call made {mode.adds} adds of stream shape and {mode.ops} attention operations; "
                f"{block.adds} and {block.attention_ops} were seen when the model was attached",
                "Attach again with inputs like the ones that you run",
            )

    def _close_modes(self) -> None:
        while self._modes:
            self._modes.pop().__exit__(None, None, None)

    def _pass_norm(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._modes:
            return None
        turn = self._norm_turns.get(module, 0)
        self._norm_turns[module] = turn + 1
        block = self._modes[-1].block
        for index, junction in enumerate(block.junctions):
            if (block.index, index) in self.edits.bypass and any(
                self._is(norm, module, turn) for norm in junction.norms
            ):
                x = args[0] if args else next(iter(kwargs.values()))
                return x.clone() if x.dtype == output.dtype else x.to(output.dtype)
        return None

    def _is(self, norm: NormAfter, module: nn.Module, turn: int) -> bool:
        return norm.turn == turn and self.model.get_submodule(norm.name) is module


def fetch(value: Any, path: Path) -> Any:
    """The item at `path` in nested tuples and dicts."""
    for key in path:
        value = value[key]
    return value


def replace(value: Any, path: Path, item: Any) -> Any:
    """A copy of nested tuples and dicts with `item` at `path`."""
    if not path:
        return item
    key, rest = path[0], path[1:]
    if isinstance(value, dict):
        return {**value, key: replace(value[key], rest, item)}
    return (*value[:key], replace(value[key], rest, item), *value[key + 1 :])
