"""Own the attention op of models that route it through the library's two attention registries.

While a model is owned, each of its configs names a delegating function of ours in place of its own
implementation. That function calls the original with what the model gave it, so that nothing changes
until a running block edits or watches the op. All state belongs to the block call that runs: a second
model that shares a config object meets the delegating function, too, and computes as before.

The library's registries keep our names for good; they do nothing while no model is owned.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from rc_probe.hooks.undo import undoing

PREFIX = "rc-probe:"
EAGER = "eager_attention_forward"  # what the library calls it in each model's file


class Owned(str):
    """The name of an implementation that we own.

    The registries find our function under it; code of a model that compares it with "eager" or "sdpa"
    sees the original, and so goes the way that it always goes. Deep copies and pickles hold the
    original's plain name.
    """

    original: str

    def __new__(cls, original: str) -> Owned:
        self = super().__new__(cls, PREFIX + original)
        self.original = original
        return self

    def __eq__(self, other: object) -> bool:
        return self.original == other or str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__  # our own, so that a registry never gives the original's entry

    def __reduce__(self) -> Any:
        return str, (self.original,)


@dataclass(frozen=True)
class OpCall:
    """One call of an attention op, as it is about to run. `replace` it to run it on other operands.

    via: `interface`, whose args are (module, query (B, H, T, d), key (B, H', S, d), value (B, H', S, d),
    mask, …) and whose result is (output (B, T, H, d), weights or None); or the intercepted
    `scaled_dot_product_attention` or `softmax`, with the arguments and the result of torch's.
    implementation: the library's name of what runs, by the interface only.
    """

    via: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    implementation: str = ""

    def run(self) -> Any:
        return self.function(*self.args, **self.kwargs)


RunOp = Callable[[OpCall], Any]


class Listener(Protocol):
    """A block call that is running under edits."""

    def holds(self, module: nn.Module) -> bool:
        """Whether `module` is part of the block."""

    def edit_routed(self, call: OpCall, run: RunOp) -> Any:
        """Run the op by `run(call)`, editing what enters it or what it returns."""

    def watch_routed(self, call: OpCall, result: Any) -> None:
        """See the op as it ran, before any edit of its result."""


class _Running(threading.local):
    """The block calls that run under edits in this thread, in the order of their contexts."""

    def __init__(self) -> None:
        self.listeners: list[Any] = []


running = _Running()


def _attention(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Stands for `original` in AttentionInterface. The library passes some operands by these names."""
    function = implementation(module, original)
    if function is None:
        raise LookupError(f"{type(module).__name__} has no attention function {original!r}")
    operands = (module, query, key, value, attention_mask, *args)
    call = OpCall("interface", function, operands, kwargs, original)
    listeners: list[Listener] = [one for one in running.listeners if one.holds(module)]

    def run(call: OpCall) -> Any:
        result = call.run()
        for listener in listeners:
            listener.watch_routed(call, result)
        return result

    step: RunOp = run
    for listener in listeners:  # as with intercepted ops, the context opened last comes first
        step = partial(listener.edit_routed, run=step)
    return step(call)


def _mask(original: str, *args: Any, **kwargs: Any) -> Any:
    """Stands for `original` in AttentionMaskInterface: the mask of the implementation that will run."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS[original](*args, **kwargs)


def implementation(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """The library's function for `name` as code of this module finds it; None if there is none.

    A model's file holds its own eager function, and may hold a registry of its own.
    """
    spaces = [vars(sys.modules[c.__module__]) for c in type(module).__mro__ if c.__module__ in sys.modules]
    eager = next((space[EAGER] for space in spaces if EAGER in space), None)
    registry = next((s["ALL_ATTENTION_FUNCTIONS"] for s in spaces if "ALL_ATTENTION_FUNCTIONS" in s), None)
    if registry is None:
        registry = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    found: Callable[..., Any] | None = registry.get(name, eager if name == "eager" else None)
    return found


def _register(original: Any) -> Owned | None:
    """Our name for an implementation, known to both registries; None for what the library does not route."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    known = AttentionInterface._global_mapping
    if not isinstance(original, str) or "|" in original or not (original == "eager" or original in known):
        return None
    # One without a mask function gets none from the library, and so does ours.
    if original in AttentionMaskInterface._global_mapping:
        AttentionMaskInterface.register(PREFIX + original, partial(_mask, original))
    AttentionInterface.register(PREFIX + original, partial(_attention, original))
    return Owned(original)


@dataclass
class _Holding:
    """A config that is owned: what it named before, and the open contexts that hold it."""

    config: Any
    before: Any
    holders: set[object] = field(default_factory=set)


_held: dict[int, _Holding] = {}
_lock = threading.RLock()


@contextmanager
def owned(model: nn.Module) -> Iterator[None]:
    """Own the attention of `model` where it goes through the library's interface.

    Contexts may be nested and closed in any order: a config gets its own implementation back when the
    last of them closes, unless somebody has set another meanwhile.
    """
    configs, holder = _configs(model), object()

    def give_back() -> None:
        for config in configs:
            with _lock:
                _give_back(config, holder)

    with undoing(give_back):
        for config in configs:
            with _lock:
                _take(config, holder)
        yield


def _take(config: Any, holder: object) -> None:
    now = config._attn_implementation_internal
    before = now.original if isinstance(now, Owned) else now
    name = _register(before)
    if name is None:
        return
    holding = _held.setdefault(id(config), _Holding(config, before))
    holding.holders.add(holder)
    if not isinstance(now, Owned):  # ours is set anew where somebody has set another meanwhile
        holding.before = before
        config._attn_implementation_internal = name


def _give_back(config: Any, holder: object) -> None:
    holding = _held.get(id(config))
    if holding is None:
        return
    holding.holders.discard(holder)
    if not holding.holders:
        if isinstance(config._attn_implementation_internal, Owned):
            config._attn_implementation_internal = holding.before
        _held.pop(id(config), None)


def _configs(model: nn.Module) -> list[Any]:
    """The configs of the model's modules and the configs within them, each once."""
    if "transformers.modeling_utils" not in sys.modules:
        return []
    found: dict[int, Any] = {}
    left = [value for module in model.modules() for value in vars(module).values()]
    while left:
        value = left.pop()
        if hasattr(value, "_attn_implementation_internal") and id(value) not in found:
            found[id(value)] = value
            left += vars(value).values()
    return list(found.values())


def implementation_name(model: nn.Module) -> str | None:
    """What the model's config names as its attention implementation, owned or not."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return name.original if isinstance(name, Owned) else name
