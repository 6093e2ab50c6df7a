"""Small models with weights that hide nothing: the one builder of the zoo and of the census.

The library starts biases, LayerScales and some gates at values that hide a term (zeros, or 1e-5), so every parameter
is drawn anew. The same arguments give the same model, and the global random state stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def make(cls: Any, config: Any, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model of the class in eval mode, as the library starts it; experts run in float64, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(config, dtype=dtype).eval()
    if dtype is torch.float64:  # the default experts, grouped_mm, have no float64
        model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def randomise(model: nn.Module, dtype: torch.dtype, seed: int = 0) -> None:
    """Draw every parameter anew, so that each term of the forward pass shows and stays of order one."""
    generator = torch.Generator().manual_seed(seed)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            start, scale = _draw(f"{path}.{name}", module, parameter)
            parameter.data = (start + scale * noise).to(
                dtype if parameter.is_floating_point() else parameter.dtype
            )


def _draw(path: str, module: nn.Module, parameter: torch.Tensor) -> tuple[float, float]:
    """Mean and deviation for a parameter, from its shape, its module and how the library starts it."""
    value = parameter.float()
    if parameter.dim() < 2 or parameter.numel() == max(parameter.shape):  # a vector, whatever its shape
        first = float(value.flatten()[0]) if value.numel() else 0.0
        if "norm" in type(module).__name__.lower() or first == 1:
            return round(float(value.mean())), 0.1  # gains start at 1 (Gemma: 0, for 1 + weight), biases at 0
        if path.endswith("bias"):
            return 0.0, 0.1
        if value.numel() == 1 or (value == first).all():
            return 0.5, 0.1  # LayerScales and gates, which start at 0 or little more
        return 0.0, 0.3
    table = any(word in path for word in ("embed", "token", "pos", "quer", "latent"))
    if isinstance(module, nn.Embedding) or (table and "weight" not in path):
        return 0.0, 0.5
    fan_in = max(parameter.shape[1:]) if parameter.dim() == 3 and not list(module.children()) else 0
    if not fan_in or isinstance(module, nn.Conv1d):
        fan_in = parameter.numel() // parameter.shape[0]
    return 0.0, 1.3 / fan_in**0.5
