"""Listen to calls: `module(...)`, `module.forward(...)`, which calls no hook, and the library's `generate`."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from inspect import signature
from typing import Any

from torch import Tensor, nn

from rc_probe.hooks.module_calls import Call, around_calls
from rc_probe.hooks.structure.structure import Structure, decodes
from rc_probe.hooks.undo import replaced, undoing

IGNORED = -100  # the label of what is no text
Before = Callable[[nn.Module, Any, Any], None]  # module, args, kwargs
After = Callable[[nn.Module], None]


class _One:
    """What one context hears."""

    def __init__(self, before: Before, after: After, heard: Callable[[], bool]) -> None:
        self.before, self.after, self.heard = before, after, heard


_listening: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[_One]] = weakref.WeakKeyDictionary()


@contextmanager
def listening(
    modules: Iterable[nn.Module], before: Before, after: After, heard: Callable[[], bool]
) -> Iterator[None]:
    """Calls `before(module, args, kwargs)` and, returned or raised, `after(module)` around each call of `modules`.

    While it is open, their classes have a `forward` that hands on to their own (not the modules
    themselves: contexts may close in any order). A module with a `forward` of its own, as accelerate
    leaves one, is heard by its calls alone.
    """
    one = _One(before, after, heard)
    with ExitStack() as stack:
        for module in modules:
            if "forward" in vars(module):
                stack.enter_context(around_calls([module], partial(_around, one), heard=heard))
                continue
            heard_by = _listening.setdefault(module, weakref.WeakSet())
            stack.enter_context(undoing(partial(heard_by.discard, one)))
            heard_by.add(one)
            stack.enter_context(replaced(type(module), "forward", partial(_heard, type(module))))
        yield


def _around(one: _One, module: nn.Module, call: Call, args: Any, kwargs: Any) -> Any:
    one.before(module, args, kwargs)
    try:
        return call()
    finally:
        one.after(module)


def _heard(cls: type[nn.Module]) -> Callable[..., Any]:
    forward = cls.forward

    @wraps(forward)
    def heard(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        listeners = [one for one in _listening.get(self, ()) if one.heard()]
        for one in listeners:
            one.before(self, args, kwargs)
        try:
            return forward(self, *args, **kwargs)
        finally:
            for one in listeners:
                one.after(self)

    return heard


def given_to(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    try:
        given = signature(function).bind_partial(*args, **kwargs).arguments
    except TypeError:  # the call itself will say what is wrong with it
        given = kwargs
    return {**given, **given.get("kwargs", {})}


def side_of(structure: Structure, module: nn.Module) -> str:
    """What the names of the stack's inputs begin with in calls of a module: `decoder_`, or nothing."""
    takes = "decoder_input_ids" in signature(module.forward).parameters
    return "decoder_" if takes and decodes(structure) else ""


def labels_alone(given: dict[str, Any], side: str) -> Tensor | None:
    """The labels (batch, tokens) that a decoder makes its inputs of, where it is given nothing else."""
    others = [given.get(f"{side}{name}") for name in ("input_ids", "inputs_embeds")]
    labels = given.get("labels")
    alone = side and not any(isinstance(value, Tensor) for value in others)
    return labels if alone and isinstance(labels, Tensor) and labels.ndim == 2 else None


def mask_in(given: dict[str, Any], side: str) -> Any:
    """The attention mask of the stack's tokens; of a decoder that gets labels alone, where these are labels."""
    mask, labels = given.get(f"{side}attention_mask"), labels_alone(given, side)
    return mask if labels is None or isinstance(mask, Tensor) else labels != IGNORED


class Generation:
    """One call of the library's `generate` that is running: its prompts (rows, tokens), and their mask if it was given."""

    def __init__(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = given_to(type(model).generate, (model, *args), kwargs)
        mains = (given.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))
        main = next((value for value in mains if isinstance(value, Tensor)), None)
        mask, config = given.get("attention_mask"), given.get("generation_config")
        texts = main is not None and not (main.ndim == 2 and main.is_floating_point())
        self.prompt = (main.shape[0], main.shape[1]) if main is not None and texts else None
        self.mask = mask if isinstance(mask, Tensor) and mask.shape == self.prompt else None
        own = getattr(model, "generation_config", None)
        chunks = (
            given.get("prefill_chunk_size"),
            *(getattr(c, "prefill_chunk_size", None) for c in (config, own)),
        )
        self.chunked = next((size for size in chunks if size), None)


_generations = threading.local()


def generation() -> Generation | None:
    """The outermost call of `generate` that runs in this thread; a helper's own calls are inside of it."""
    running = getattr(_generations, "running", [])
    return running[0] if running else None


@contextmanager
def hearing_generate() -> Iterator[None]:
    """Inside, `generation()` knows of calls of the library's `generate`, of any model."""
    mixin = getattr(sys.modules.get("transformers.generation.utils"), "GenerationMixin", None)
    if mixin is None:
        yield
        return
    with replaced(mixin, "generate", lambda: _generate_heard(mixin.generate)):
        yield


def _generate_heard(generate: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(generate)
    def heard(self: Any, *args: Any, **kwargs: Any) -> Any:
        running = vars(_generations).setdefault("running", [])
        one = Generation(self, args, kwargs)

        def end() -> None:
            if one in running:
                running.remove(one)

        with undoing(end):
            running.append(one)
            return generate(self, *args, **kwargs)

    return heard
