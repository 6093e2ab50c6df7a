"""The `init` weights: a model like the given one, before any training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .libraries import quiet
from .load import Loaded
from .locate import Source
from .model_inputs import input_device


def fresh_model(loaded: Any, seed: int = 0) -> Any:
    """The `init` weights: same class and config, freshly initialised, same device and dtypes, in eval mode.

    `loaded` is a Loaded or a transformers model. The numbers depend on the config and `seed` only: they
    are drawn on the CPU in the default dtype and then cast. The global random state is as before. Compiled
    graphs, adapters and int8 weights are left out: they come after training.
    """
    model = loaded.model if isinstance(loaded, Loaded) else loaded
    model = getattr(model, "_orig_mod", model)  # torch.compile
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    source = Source(loaded.id if isinstance(loaded, Loaded) else type(model).__name__, "", {})
    devices = getattr(model, "hf_device_map", None) or {}
    todo = "Use --no-init to measure the pretrained weights only"
    if "disk" in devices.values():
        raise source.error("a model offloaded to disk cannot be initialised afresh", todo)
    with quiet(), source.explain("no fresh copy can be made", todo):
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
            fresh = type(model)(copy.deepcopy(model.config))
        like = {_plain(name): tensor.dtype for name, tensor in _tensors(model)}
        for name, tensor in _tensors(fresh):
            tensor.data = tensor.data.to(like.get(name, tensor.dtype))
        if len(devices) > 1:
            from accelerate import dispatch_model

            return dispatch_model(fresh.eval(), device_map=devices)
        return fresh.to(input_device(model)).eval()


def _plain(name: str) -> str:
    """The name that the weight has in a model of which no part is compiled or adapted."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "base_layer"))


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
