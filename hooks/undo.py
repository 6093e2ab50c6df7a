"""Changes outside of a context's own objects, taken back whatever interrupts them and in whatever order contexts close.

Contexts are generators: one that is dropped is closed when Python collects it, and so takes back what it changed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

_MISSING = object()
HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)  # fmt: skip


@contextmanager
def undoing(undo: Callable[[], object]) -> Iterator[None]:
    """At the end `undo()`, twice: an interrupt may end the first at any line. The second must do no harm."""
    try:
        try:
            yield
        finally:
            undo()
    finally:
        undo()


def unhook(module: nn.Module, run: Callable[..., Any]) -> None:
    """The module does not call `run` any more; does no harm a second time.

    Torch's handle comes only after the hook is there, and the collector, which closes dropped contexts, may have taken its
    references.
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, each in hooks.items() if each is run]:
            for kind in HOOKS:
                getattr(module, kind).pop(number, None)


@contextmanager
def hook(register: Callable[..., Any], run: Callable[..., Any], **how: Any) -> Iterator[None]:
    """Inside, a module calls `run`: `hook(module.register_forward_hook, run)`."""
    module: nn.Module = register.__self__  # type: ignore[attr-defined]
    with undoing(partial(unhook, module, run)):
        register(run, **how)
        yield


@contextmanager
def entered(mode: TorchFunctionMode) -> Iterator[None]:
    """Inside, the mode sees what is computed. A plain `with` that is interrupted as it ends would leave it on."""

    def leave() -> None:
        if mode in _get_current_function_mode_stack():
            mode.__exit__(None, None, None)

    with undoing(leave):
        mode.__enter__()
        yield


@contextmanager
def unseen() -> Iterator[None]:
    """Inside, no mode sees what is computed. An interrupt at the end of a `with` leaves torch's own guard on; this one goes."""
    guard = torch._C.DisableTorchFunction()
    with undoing(partial(guard.__exit__, None, None, None)):
        guard.__enter__()
        yield


class Living(AbstractContextManager[Any]):
    """A context whose life is the generator `_lives`: entered up to its `yield`, closed however the context ends."""

    _life: Iterator[None] | None = None

    @abstractmethod
    def _lives(self) -> Iterator[None]:
        """Opens, yields once, and takes everything back."""

    def __enter__(self) -> Self:
        self._life = self._lives()
        try:
            next(self._life)
            return self
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Everything is as before. Does nothing where it is closed already."""
        if isinstance(self._life, Generator):
            self._life.close()


class Shared:
    """A change that holds while somebody holds it. `change()` makes it and returns what takes it back."""

    def __init__(self, change: Callable[[], None], back: Callable[[], None]) -> None:
        self.change, self.back = change, back
        self.holders: set[object] = set()

    @contextmanager
    def held(self) -> Iterator[None]:
        holder = object()
        with undoing(lambda: self._release(holder)):
            self.holders.add(holder)
            self.change()
            yield

    def _release(self, holder: object) -> None:
        self.holders.discard(holder)
        if not self.holders:
            self.back()


class _Replaced:
    """An attribute with ours in its place."""

    def __init__(self, owner: Any, name: str, ours: Any) -> None:
        self.owner, self.name, self.ours = owner, name, ours
        self.before = vars(owner).get(name, _MISSING)
        self.holders: set[object] = set()

    @property
    def there(self) -> bool:
        return vars(self.owner).get(self.name) is self.ours

    def put_back(self) -> None:
        if not self.there:  # not yet, not any more, or somebody has set another meanwhile
            return
        if self.before is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


_replaced: dict[
    tuple[int, str], _Replaced
] = {}  # each keeps its owner, so that the id stays that of this one


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[], Any]) -> Iterator[Any]:
    """Inside, the attribute `name` of `owner` is what `make()` gave the first that asked; that one for all of them."""
    holder, key = object(), (id(owner), name)

    def leave() -> None:
        entry = _replaced.get(key)
        if entry is None or entry.owner is not owner:
            return
        entry.holders.discard(holder)
        if not entry.holders:
            entry.put_back()
            _replaced.pop(key, None)

    with undoing(leave):
        entry = _replaced.get(key)
        if (
            entry is None or not entry.there
        ):  # somebody has set another meanwhile: ours stands before that one
            entry = _replaced[key] = _Replaced(owner, name, make())
        entry.holders.add(holder)
        setattr(owner, name, entry.ours)
        yield entry.ours
