"""Half-precision models run in float32, without a float32 copy of their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from rc_probe.hooks.linear_maps import TABLE, linear_in_single
from rc_probe.hooks.undo import entered

from .model_state import full_precision

HALVES = {torch.float16, torch.bfloat16}


@contextmanager
def single_precision(model: nn.Module) -> Iterator[None]:
    """As `full_precision`; and half-precision weights enter every operation as float32, so that streams are float32.

    Weights stay as they are: only those of the operation at hand are there twice. A model in float32 or float64 is
    run as it is.
    """
    with full_precision(model):
        halves = any(p.dtype in HALVES for p in model.parameters())
        with entered(_Float32()) if halves else nullcontext():
            yield


class _Float32(TorchFunctionMode):
    """Half-precision operands are taken as float32, and what is asked for in half precision is given in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "embedding":  # rows of a table that may be the largest of all weights
            return _single(func(*args, **(kwargs or {})))
        if name in {"__get__", "__set__"} or (name.endswith("_") and not name.startswith("_")):
            return func(*args, **(kwargs or {}))  # what a tensor is, and what is written into one
        if name == "linear" and _of_a_table(*args, **(kwargs or {})):
            func = linear_in_single
        else:
            args, kwargs = tree_map(_single, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _of_a_table(input: Any, weight: Any, bias: Any = None) -> bool:
    """Whether it is a product with more weights of half precision than should be there twice."""
    return (
        type(input) is Tensor and input.dtype == torch.float32
        and weight.dtype in HALVES and weight.numel() >= TABLE
    )  # fmt: skip


def _single(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float32 if value in HALVES else value
    half = type(value) in (Tensor, nn.Parameter) and value.dtype in HALVES
    return value.float() if half else value
