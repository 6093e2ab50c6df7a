"""What a model takes as input, and where."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def accepts(model: Any, name: str) -> bool:
    """Whether the forward pass takes an input of that name; a wrapper's `*args, **kwargs` takes all."""
    names = inspect.signature(model.forward).parameters
    return name in names or model.main_input_name not in names


def input_device(model: Any) -> torch.device:
    """Where inputs go; a model that accelerate dispatches moves them on by itself."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device
