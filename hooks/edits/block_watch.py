"""Watch the calls of a stack's blocks: what enters them and what leaves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import nn

from rc_probe.hooks.structure.structure import Candidate, CandidateBlock
from rc_probe.hooks.structure.tape import Place

from .model_state import eager, recomputing


class BlockWatch(AbstractContextManager["BlockWatch"]):
    """Knows which block call is running: calls `enter(block, args, kwargs)` and `leave(block, output)`.

    A module that is called several times in a pass (ALBERT) is told apart by its turn; turns start
    anew whenever a module that contains all blocks is called. `leave` gets None when the block
    raised. Hooks are removed when the context closes, whatever happened. The first `skipped` block calls of
    every pass are not made.
    """

    prepend = True  # before the user's own hooks on a block

    def __init__(self, structure: Candidate, indices: Iterable[int], *, skipped: int = 0) -> None:
        self.structure = structure
        self.model = structure.model  # the structure alone keeps no model alive
        self.wanted = set(indices)
        self._thread = threading.get_ident()
        self.forced: int | None = None  # a replay says itself which block call it stands for
        self._skipped: dict[nn.Module, int] = {}
        for block in structure.blocks[:skipped]:
            module = structure.module(block)
            self._skipped[module] = self._skipped.get(module, 0) + 1
        self._turns = dict(self._skipped)
        self._running: list[CandidateBlock | None] = []
        self._exit = ExitStack()

    def enter(self, block: CandidateBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """May return new (args, kwargs)."""

    def leave(self, block: CandidateBlock, output: Any) -> Any:
        """May return another output."""

    def __enter__(self) -> BlockWatch:
        by_module: dict[nn.Module, list[CandidateBlock]] = {}
        for block in self.structure.blocks:
            by_module.setdefault(self.structure.module(block), []).append(block)
        self._exit.enter_context(eager())
        self._exit.callback(self._running.clear)
        for module, calls in by_module.items():
            if any(b.index in self.wanted for b in calls):
                self._hook(module.register_forward_pre_hook(self._before(calls), with_kwargs=True))
                self._hook(module.register_forward_hook(self._after, prepend=self.prepend, always_call=True))
        for name in self.structure.ancestors:
            self._hook(self.model.get_submodule(name).register_forward_pre_hook(self._reset))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._exit.close()

    def _hook(self, handle: Any) -> None:
        self._exit.callback(handle.remove)

    def _reset(self, module: nn.Module, args: Any) -> None:
        self._turns = dict(self._skipped)

    def _before(self, calls: list[CandidateBlock]) -> Callable[..., Any]:
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


def fetch(value: Any, place: Place) -> Any:
    """The item at `place` in nested tuples and dicts."""
    for key in place:
        value = value[key]
    return value


def replace(value: Any, place: Place, item: Any) -> Any:
    """A copy of nested tuples and dicts with `item` at `place`."""
    if not place:
        return item
    key, rest = place[0], place[1:]
    if isinstance(value, dict):
        return {**value, key: replace(value[key], rest, item)}
    return (*value[:key], replace(value[key], rest, item), *value[key + 1 :])
