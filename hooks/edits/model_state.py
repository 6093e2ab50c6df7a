"""Leave the model and the random numbers as they were."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, random numbers forked; everything is put back at the end."""
    training = [module for module in model.modules() if module.training]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            for module in training:
                module.training = False
            yield
    finally:
        for module in training:
            module.training = True


class _Held:
    """How many contexts hold eager mode; they may close in any order, so none restores what it found."""

    count = 0
    exit = ExitStack()


@contextmanager
def eager() -> Iterator[None]:
    """Run models operation by operation: compiled graphs and torch's fused encoder layers call no hook.

    Their graphs stay, and are used again afterwards.
    """
    if not _Held.count:
        _Held.exit.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes seconds
            _Held.exit.enter_context(torch.compiler.set_stance("force_eager"))
    _Held.count += 1
    try:
        yield
    finally:
        _Held.count -= 1
        if not _Held.count:
            _Held.exit.close()


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


def switches(model: nn.Module) -> int:
    """A hash of the modules and of their plain settings, such as which adapter is on: what a call does."""

    def plain(value: Any) -> bool:
        return isinstance(value, (bool, int, float, str))

    return hash(
        tuple(
            (name, id(module), key, str(value))
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if key != "training" and (plain(value) or (isinstance(value, list) and all(map(plain, value))))
        )
    )
