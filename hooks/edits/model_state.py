"""Leave the model and the random numbers as they were."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from rc_probe.hooks.undo import Shared, undoing


class _Own(threading.local):
    """How many passes of our own are running in this thread, one inside the other, and how many proofs."""

    passes = proofs = 0


_own = _Own()


class Level:
    """When a context was opened: it does not see what begins later and is our own.

    Passes of our own are none of the user's, so that no statistics see them (`observes`). Proofs are about the model as
    it is without any context, so that nobody sees these.
    """

    def __init__(self, *, observes: bool) -> None:
        self.observes, self.passes, self.proofs = observes, _own.passes, _own.proofs

    def heard(self) -> bool:
        return _own.proofs <= self.proofs and not (self.observes and _own.passes > self.passes)


@contextmanager
def proving() -> Iterator[None]:
    """What runs inside runs as if no context were open."""
    before = _own.proofs

    def back() -> None:
        _own.proofs = before

    with undoing(back):
        _own.proofs = before + 1
        yield


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Passes of our own: evaluation mode, no gradients, random numbers forked, unseen by contexts that were open before.

    Everything is put back at the end, also attributes that the model's code changes as it runs.
    """
    before, own = _attributes(model), _own.passes
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})

    def back() -> None:
        _own.passes = own
        for attributes, values in before:
            _put_back(attributes, values)

    with undoing(back), torch.no_grad(), torch.random.fork_rng(devices=devices):
        _own.passes = own + 1
        for module in model.modules():
            module.training = False
        yield


def _attributes(model: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The attributes, buffers and submodules of each module, and what is in them now."""
    found = [d for module in model.modules() for d in (vars(module), module._buffers, module._modules)]
    return [(attributes, dict(attributes)) for attributes in found]


def _put_back(attributes: dict[str, Any], values: dict[str, Any]) -> None:
    for name in [name for name in attributes if name not in values]:
        del attributes[name]
    for name, value in values.items():
        if name not in attributes or attributes[name] is not value:
            attributes[name] = value


_before: dict[str, Any] = {}  # of what `eager` changes


def _go_eager() -> None:
    if "fastpath" not in _before:
        _before["fastpath"] = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    if "stance" not in _before and "torch._dynamo" in sys.modules:
        # else nothing is compiled, and importing it takes seconds
        _before["stance"] = torch.compiler.set_stance("force_eager")


def _go_back() -> None:
    if "fastpath" in _before:
        torch.backends.mha.set_fastpath_enabled(_before["fastpath"])
    if "stance" in _before:
        _before["stance"].__exit__(None, None, None)
    _before.clear()


_eager = Shared(_go_eager, _go_back)


def eager() -> AbstractContextManager[None]:
    """Run models operation by operation: compiled graphs and torch's fused encoder layers call no hook.

    Their graphs stay, and are used again afterwards. Contexts may close in any order.
    """
    return _eager.held()


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Autocast off on the devices of `model`: what is the same in exact arithmetic then rounds the same."""
    with ExitStack() as stack:
        for kind in {p.device.type for p in model.parameters()} - {"meta"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def recomputing() -> bool:
    """Whether a backward pass is running: a block called now is recomputed for gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def grad_mode() -> tuple[bool, Any]:
    """Whether gradients are recorded, and what is done with saved tensors: checkpointing changes one of them."""
    saved = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # since torch 2.8
    return torch.is_grad_enabled(), saved and saved(True)


def switches(model: nn.Module, kinds: tuple[type, ...] = (bool, int, float, str)) -> int:
    """A hash of the modules and of their settings of these kinds, such as which adapter is on: what a call does."""

    def plain(value: Any) -> bool:
        return isinstance(value, kinds)

    return hash(
        tuple(
            (name, id(module), key, str(value))
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if key != "training" and (plain(value) or (isinstance(value, list) and all(map(plain, value))))
        )
    )
