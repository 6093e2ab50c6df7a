"""Stand around whole calls of modules: what their hooks do, those of the user too, is part of the call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

from torch import nn

Call = Callable[[], Any]
Around = Callable[[nn.Module, Call], Any]  # gets the call, to make it or not; returns what the caller gets


class AroundCalls(AbstractContextManager["AroundCalls"]):
    """Inside, `around(module, call)` stands in place of each call of `modules`. Contexts close in reverse order."""

    def __init__(self, modules: Iterable[nn.Module], around: Around) -> None:
        self.modules, self.around = list(dict.fromkeys(modules)), around
        self._exit = ExitStack()

    def __enter__(self) -> AroundCalls:
        for module in self.modules:
            before = vars(module).get("_compiled_call_impl")
            call = before or module._call_impl
            # What nn.Module.__call__ hands on to, before any hook.
            vars(module)["_compiled_call_impl"] = partial(self._called, module, call)
            self._exit.callback(_put_back, module, before)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._exit.close()

    def _called(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.around(module, partial(call, *args, **kwargs))


def _put_back(module: nn.Module, before: Any) -> None:
    if before is None:
        vars(module).pop("_compiled_call_impl", None)
    else:
        vars(module)["_compiled_call_impl"] = before
