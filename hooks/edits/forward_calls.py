"""Listen to calls of modules: `module(...)`, and `module.forward(...)`, which calls no hook."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import partial, wraps
from typing import Any

from torch import nn

Before = Callable[[nn.Module, Any, Any], None]  # module, args, kwargs
After = Callable[[nn.Module], None]

_listening: weakref.WeakKeyDictionary[nn.Module, list[Listening]] = weakref.WeakKeyDictionary()


class Listening(AbstractContextManager["Listening"]):
    """Calls `before(module, args, kwargs)` and, returned or raised, `after(module)` around each call of `modules`.

    While it is open, their classes have a `forward` that hands on to their own (not the modules
    themselves: contexts may close in any order). A module with a `forward` of its own, as accelerate
    leaves one, is heard by its hooks alone.
    """

    def __init__(self, modules: Iterable[nn.Module], before: Before, after: After) -> None:
        self.modules, self.before, self.after = list(modules), before, after
        self._exit = ExitStack()

    def __enter__(self) -> Listening:
        for module in self.modules:
            if "forward" in vars(module):
                before = module.register_forward_pre_hook(self.before, with_kwargs=True)
                after = module.register_forward_hook(lambda m, *rest: self.after(m), always_call=True)
                self._exit.callback(before.remove)
                self._exit.callback(after.remove)
                continue
            _own(type(module))
            _listening.setdefault(module, []).append(self)
            self._exit.callback(partial(self._leave, module))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._exit.close()

    def _leave(self, module: nn.Module) -> None:
        _listening[module].remove(self)
        if not _listening[module]:
            del _listening[module]
        if not any(type(other) is type(module) for other in _listening):
            _disown(type(module))


def _own(cls: type[nn.Module]) -> None:
    if hasattr(vars(cls).get("forward"), "heard"):
        return
    forward = cls.forward

    @wraps(forward)
    def heard(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        listeners = tuple(_listening.get(self, ()))
        for one in listeners:
            one.before(self, args, kwargs)
        try:
            return forward(self, *args, **kwargs)
        finally:
            for one in listeners:
                one.after(self)

    heard.heard = "forward" in vars(cls)  # type: ignore[attr-defined]  # whether it is the class's own
    cls.forward = heard


def _disown(cls: type[nn.Module]) -> None:
    heard = vars(cls).get("forward")
    own = getattr(heard, "heard", None)
    if own:
        cls.forward = heard.__wrapped__  # type: ignore[union-attr]
    elif own is False:
        del cls.forward
