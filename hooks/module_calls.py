"""Stand around whole calls of modules: what their hooks do, those of the user too, is part of the call.

Nothing is put among a module's hooks. What stands here is no part of a module's state: copies and pickles do not have it.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import CodeType, FrameType
from typing import Any

from torch import nn

from rc_probe.hooks.undo import replaced, undoing

Call = Callable[[], Any]
Around = Callable[[nn.Module, Call, tuple[Any, ...], dict[str, Any]], Any]
CALL = "_compiled_call_impl"  # what nn.Module.__call__ hands on to, before any hook


class _One:
    """What one context does around calls."""

    def __init__(self, around: Around, heard: Callable[[], bool]) -> None:
        self.around, self.heard = around, heard


class _Dispatch:
    """Stands in place of a module's call: the contexts that stand around it, from the outside in."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = vars(module).get(CALL)  # of one that is compiled in place
        self.contexts: list[weakref.ref[_One]] = []  # weak, so that a context that is dropped is closed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._step([ref() for ref in self.contexts], args, kwargs)

    def _step(self, left: list[_One | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for number, one in enumerate(left):
            if one is not None and one.heard():
                inner = partial(self._step, left[number + 1 :], args, kwargs)
                return one.around(self.module, inner, args, kwargs)
        return (self.before or self.module._call_impl)(*args, **kwargs)


def _always() -> bool:
    return True


@contextmanager
def around_calls(
    modules: Iterable[nn.Module],
    around: Around,
    *,
    outermost: bool = False,
    heard: Callable[[], bool] = _always,
) -> Iterator[None]:
    """Inside, `around(module, call, args, kwargs)` stands in place of each call of `modules`.

    It makes the call by `call()`, or not, and returns what the caller gets. One that was opened later is called inside
    of earlier ones, or with `outermost` outside of them. `heard` says whether it is asked at all. Contexts may close in
    any order.
    """
    one = _One(around, heard)
    mine = weakref.ref(one)
    with ExitStack() as stack:
        for module in dict.fromkeys(modules):
            dispatch = stack.enter_context(replaced(module, CALL, partial(_Dispatch, module)))
            stack.enter_context(undoing(partial(_forget, dispatch.contexts, mine)))
            dispatch.contexts.insert(0 if outermost else len(dispatch.contexts), mine)
        yield


def _forget(contexts: list[weakref.ref[_One]], mine: weakref.ref[_One]) -> None:
    while mine in contexts:
        contexts.remove(mine)


def listened_to(module: nn.Module) -> bool:
    """Whether a context stands around its calls, and is asked."""
    dispatch = vars(module).get(CALL)
    found = [ref() for ref in dispatch.contexts] if isinstance(dispatch, _Dispatch) else []
    return any(one is not None and one.heard() for one in found)


_IMPL = nn.Module._call_impl.__code__
_CALLS = {
    _IMPL,
    *(code for code in _IMPL.co_consts if isinstance(code, CodeType) and code.co_name == "inner"),
}


def in_hook() -> bool:
    """Whether what runs now is run by a hook of a module: it is no doing of the module's own code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        above = frame.f_back
        if above is not None and above.f_code in _CALLS:
            module = above.f_locals.get("self")
            if module is not None and hooked(module) and frame.f_code in map(_code, _hooks(module)):
                return True
        frame = above
    return False


def hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _hooks(module: nn.Module) -> Iterator[Any]:
    yield from (*module._forward_hooks.values(), *module._forward_pre_hooks.values())


def _code(hook: Any) -> Any:
    """The code that runs first when the hook is called."""
    while isinstance(hook, partial):
        hook = hook.func
    hook = getattr(hook, "__func__", hook)
    return getattr(hook if hasattr(hook, "__code__") else type(hook).__call__, "__code__", None)


_told: weakref.WeakKeyDictionary[nn.Module, dict[object, str]] = (
    weakref.WeakKeyDictionary()
)  # by contexts: their names


@contextmanager
def copies_told(model: nn.Module, what: str) -> Iterator[None]:
    """A deep copy or a pickle of `model` that is made inside has nothing of the context `what`: a warning says so."""
    names, holder = _told.setdefault(model, {}), object()
    with (
        undoing(lambda: names.pop(holder, None)),
        replaced(type(model), "__reduce_ex__", partial(_reducing, type(model))),
    ):
        names[holder] = what
        yield


def _reducing(cls: type[nn.Module]) -> Callable[..., Any]:
    reduce = cls.__reduce_ex__

    def telling(self: nn.Module, protocol: Any) -> Any:
        names = _told.get(self, {}).values()
        if names:
            warnings.warn(
                f"{type(self).__name__}: this copy, or this pickle for a file or another process, is made inside of "
                f"{' and '.join(dict.fromkeys(names))} and runs without",
                stacklevel=2,
            )
        return reduce(self, protocol)

    return telling
