"""Watch the calls of a stack's blocks: what enters them and what leaves."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from rc_probe.hooks.module_calls import Call, around_calls
from rc_probe.hooks.structure.structure import Candidate, CandidateBlock
from rc_probe.hooks.structure.tape import Place
from rc_probe.hooks.undo import Living, undoing, unhook

from .model_state import Level, eager, recomputing


class BlockWatch(Living):
    """Knows which block call is running: calls `enter(block, args, kwargs)`, `leave(block, output)`, `returned`, `ended`.

    `enter` and `leave` stand between the user's hooks and the block's own code, whenever these hooks were registered:
    what a hook makes of a tensor is not the block's doing. `returned` sees what the caller gets.

    A module that is called several times in a pass (ALBERT) is told apart by its turn; turns start
    anew whenever a module that contains all blocks is called. The first `skipped` block calls of every pass are not made.
    """

    observes = False  # whether it only looks on, and not at passes of our own

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

    # -- for subclasses -----------------------------------------------------------------------
    def begin(self) -> None:
        """A module that holds all blocks is called."""

    def enter(self, block: CandidateBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's own code begins. May return new (args, kwargs)."""

    def leave(self, block: CandidateBlock, output: Any) -> Any:
        """The block's own code is done. May return another output."""

    def returned(self, block: CandidateBlock, output: Any) -> None:
        """The call is done, the user's hooks too."""

    def ended(self, block: CandidateBlock) -> None:
        """The call returned or raised: what `enter` began has to end, if it has not."""

    def instead(self, block: CandidateBlock, call: Call) -> Any:
        """Makes the call, or returns what it would return."""
        return call()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """What else is changed while the context is open."""
        yield

    # -- the context --------------------------------------------------------------------------
    def _lives(self) -> Iterator[None]:
        self._calls: dict[nn.Module, list[CandidateBlock]] = {}
        for block in self.structure.blocks:
            self._calls.setdefault(self.structure.module(block), []).append(block)
        modules = [m for m, calls in self._calls.items() if any(b.index in self.wanted for b in calls)]
        holders = [self.model.get_submodule(name) for name in self.structure.ancestors]
        self._level = Level(observes=self.observes)
        self._turns = dict(self._skipped)
        with (
            eager(),
            around_calls(holders, self._begin, heard=self.heard),
            around_calls(modules, self._around, heard=self.heard),
            self.opened(),
        ):
            yield

    def heard(self) -> bool:
        """Whether it is asked about the call that begins."""
        return self._level.heard()

    def _begin(self, module: nn.Module, call: Call, args: Any, kwargs: Any) -> Any:
        self._turns = dict(self._skipped)
        self.begin()
        return call()

    def _around(self, module: nn.Module, call: Call, args: Any, kwargs: Any) -> Any:
        block = self._block_of(module)
        if block is None:
            return call()
        self.called_with: tuple[Any, Any] = (args, kwargs)
        before, after = partial(self._run_enter, block), partial(self._run_leave, block)

        def end() -> None:
            unhook(module, before)
            unhook(module, after)
            self.ended(block)

        with undoing(end):
            module.register_forward_pre_hook(before, with_kwargs=True)
            module.register_forward_hook(after, prepend=True)
            output = self.instead(block, call)
        self.returned(block, output)
        return output

    def _run_enter(self, block: CandidateBlock, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return self.enter(block, args, kwargs)

    def _run_leave(self, block: CandidateBlock, module: nn.Module, args: Any, output: Any) -> Any:
        return self.leave(block, output)

    def _block_of(self, module: nn.Module) -> CandidateBlock | None:
        """Which block call this is, if it is one of those that are wanted."""
        calls = self._calls[module]
        if threading.get_ident() != self._thread and not recomputing():  # autograd has threads of its own
            raise self.structure.error(
                calls[0],
                "it is run by another thread than the one that opened the context",
                "Use one thread: open the context in the thread that runs the model",
            )
        if torch._C._get_tracing_state() is not None:
            raise self.structure.error(
                calls[0],
                "it is being traced inside of a context, and a trace would keep what the context does",
                "Trace it outside",
            )
        turn = self._turns.get(module, 0)
        self._turns[module] = turn + 1
        block = next((b for b in calls if b.turn == turn % b.turns), None)
        if self.forced is not None:
            block = self.structure.blocks[self.forced]
        return block if block is not None and block.index in self.wanted else None


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
