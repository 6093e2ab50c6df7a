"""Edits: functions applied to one operand of one add, around an attention op, or past a norm.

An edit never touches weights. While a block with edits runs, a TorchFunctionMode counts the adds of
stream shape and hands the chosen operand through its function before the real add is run; the real
add keeps dtype and layout as the model made them. Outside these blocks nothing is intercepted.

Attention ops are edited the same way, by the library's interface where the model routes through it
and else where the mode meets them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .blockmode import BlockMode, Function, OpEdit, OpKey, OpWatch, Plan
from .interface import OpCall, Run, owned
from .state import eager, recomputing
from .structure import INTERFACE, AttentionOp, Block, Site, Structure
from .tape import Path


@dataclass
class Edits:
    """What to do where. Several edits at one place are applied in the order in which they came."""

    operands: dict[Site, Function] = field(default_factory=dict)
    ops: dict[tuple[int, OpKey], OpEdit] = field(default_factory=dict)
    watches: dict[tuple[int, OpKey], OpWatch] = field(default_factory=dict)
    bypass: set[tuple[int, int]] = field(default_factory=set)  # (block, junction) whose norms are left out

    def at(self, site: Site, function: Function) -> None:
        first = self.operands.get(site)
        self.operands[site] = function if first is None else lambda x: function(first(x))

    def around_op(self, block: int, op: AttentionOp, edit: OpEdit) -> None:
        """Edit what enters or leaves an attention op: `edit` gets the call and the function that runs it.

        New masks and temperatures go here, as `lambda call, run: run(replace(call, args=…))`.
        """
        key = _key(block, op)
        first = self.ops.get(key)
        self.ops[key] = edit if first is None else lambda call, run: edit(call, lambda c: first(c, run))

    def at_op(self, block: int, op: AttentionOp, function: Function) -> None:
        """Hand the op's output through `function`: see AttentionOp for its layout."""

        def edit(call: OpCall, run: Run) -> Any:
            result = run(call)
            return (function(result[0]), *result[1:]) if isinstance(result, tuple) else function(result)

        self.around_op(block, op, edit)

    def watch_op(self, block: int, op: AttentionOp, watch: OpWatch) -> None:
        """See an attention op as it runs, whatever other contexts do to its operands."""
        key = _key(block, op)
        first = self.watches.get(key)

        def both(call: OpCall, result: Any) -> None:
            if first is not None:
                first(call, result)
            watch(call, result)

        self.watches[key] = both

    @property
    def blocks(self) -> set[int]:
        ops = {block for block, _ in (*self.ops, *self.watches)}
        return {s.block for s in self.operands} | ops | {b for b, _ in self.bypass}

    @property
    def routed(self) -> bool:
        """Whether the attention interface has to be owned."""
        return any(routed for _, (routed, _) in (*self.ops, *self.watches))


def _key(block: int, op: AttentionOp) -> tuple[int, OpKey]:
    return block, (op.via == INTERFACE, op.ordinal)


def zero(x: Tensor) -> Tensor:
    """The edit that removes an operand exactly."""
    return torch.zeros_like(x)


def _plans(structure: Structure, edits: Edits, owning: bool) -> dict[int, Plan]:
    plans = {index: Plan() for index in edits.blocks}
    for site, function in edits.operands.items():
        plans[site.block].operands.setdefault(site.ordinal, []).append((site.operand, function))
    for (index, key), edit in edits.ops.items():
        plans[index].ops[key] = edit
    for (index, key), watch in edits.watches.items():
        plans[index].watches[key] = watch
    for index, junction in edits.bypass:
        norms = structure.blocks[index].junctions[junction].norms
        plans[index].norms |= {(structure.model.get_submodule(n.name), n.turn) for n in norms}
    if owning:
        for index, plan in plans.items():
            plan.modules = set(structure.module(structure.blocks[index]).modules())
    return plans


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

    def leave(self, block: Block, output: Any) -> Any:
        """May return another output."""

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
            block = by_turn.get(turn % calls[0].turns)
            if self.forced is not None:
                block = self.structure.blocks[self.forced]
            if block is not None and block.index not in self.wanted:
                block = None
            self._running.append(block)
            return self.enter(block, args, kwargs) if block is not None else None

        return hook

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        block = self._running.pop() if self._running else None
        return self.leave(block, output) if block is not None else None


class Editing(BlockWatch):
    """Context in which the model runs with `edits`. The model is as before when it closes.

    `own` takes the attention interface over even where no edit needs it.
    """

    def __init__(self, structure: Structure, edits: Edits, *, own: bool = False) -> None:
        super().__init__(structure, edits.blocks)
        self.own = own or edits.routed
        self._plans = _plans(structure, edits, self.own)
        self._modes: list[BlockMode] = []

    def __enter__(self) -> Editing:
        super().__enter__()
        self._exit.callback(self._close_modes)
        for module in {module for plan in self._plans.values() for module, _ in plan.norms}:
            self._hook(module.register_forward_hook(self._pass_norm, with_kwargs=True))
        if self.own:
            self._exit.enter_context(owned(self.model))
        return self

    def enter(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recomputing() and sum(b.name == block.name for b in self.structure.blocks) > 1:
            raise self.structure.error(
                block,
                "gradient checkpointing recomputes a module that is called several times, and the gates of which "
                "call cannot be told",
                "Run it without gradient checkpointing",
            )
        self._modes.append(BlockMode(block, self._plans[block.index]).__enter__())

    def leave(self, block: Block, output: Any) -> None:
        mode = self._modes.pop()
        mode.__exit__(None, None, None)
        if output is None:
            return
        # How many attention operations there are may depend on the inputs, one for each image of a batch.
        fits = mode.adds == block.adds
        if mode.plan.ops or mode.plan.watches:
            fits = fits and mode.ops == block.attention_ops
        if mode.plan.routed:
            fits = fits and len(mode.routed) == block.routed
        if not fits:
            raise self.structure.error(
                block,
                f"this call made {mode.adds} adds of stream shape, {mode.ops} attention operations and "
                f"{len(mode.routed)} calls of the attention interface; {block.adds}, {block.attention_ops} and "
                f"{block.routed} were seen when the model was attached",
                "Attach again with inputs like the ones that you run",
            )

    def _close_modes(self) -> None:
        while self._modes:
            self._modes.pop().__exit__(None, None, None)

    def _pass_norm(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._modes:
            return None
        mode = self._modes[-1]
        turn = mode.norm_turns.get(module, 0)
        mode.norm_turns[module] = turn + 1
        if (module, turn) not in mode.plan.norms:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        return x.clone() if x.dtype == output.dtype else x.to(output.dtype)


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
