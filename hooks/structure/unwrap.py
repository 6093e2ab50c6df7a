"""The model inside what torch and other libraries wrap around it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rc_probe.hooks.errors import RcProbeError

WRAPPERS = (nn.DataParallel, DistributedDataParallel)


def check_module(model: Any) -> None:
    """RcProbeError for what is no module."""
    if not isinstance(model, nn.Module):
        shown = repr(model) if isinstance(model, str) else getattr(model, "__name__", type(model).__name__)
        todo = "Load it first: AutoModel.from_pretrained(…), or measure it by name: rc_probe.probe(…)"
        raise RcProbeError("no model in memory", where=f"{shown:.80}", todo=todo)


def unwrapped(model: nn.Module) -> nn.Module:
    """`model`, or what is inside what compiles or distributes it, or inside one of sentence-transformers' models.

    Raises RcProbeError when a model of sentence-transformers holds no transformers model, or several.
    """
    while (inner := _inside(model)) is not model:
        model = inner
    if not any(cls.__module__.partition(".")[0] == "sentence_transformers" for cls in type(model).__mro__):
        return model
    inside: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        whole = hasattr(module, "config") and hasattr(module, "main_input_name")
        if whole and not any(name.startswith(f"{outer}.") for outer in inside):
            inside[name] = module
    if len(inside) != 1:
        names = ", ".join(inside)
        raise RcProbeError(
            f"it holds {len(inside)} transformers models ({names})"
            if inside
            else "no transformers model in it",
            where=type(model).__name__,
            todo="Give one of them" if inside else "Only models with a stack of blocks can be measured",
        )
    (found,) = inside.values()
    return getattr(found, "_orig_mod", found)


def _inside(model: nn.Module) -> nn.Module:
    """What torch.compile, DataParallel on one device, or a wrapper that trains in several processes holds."""
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise RcProbeError(
            "it runs copies of the model in threads of their own, which no context can follow",
            where="DataParallel",
            todo="Give the model inside, model.module, and run that",
        )
    inner = getattr(model, "_orig_mod", None)
    if inner is None and (isinstance(model, WRAPPERS) or type(model).__name__ == "DeepSpeedEngine"):
        inner = model.module
    return model if inner is None else inner
