"""A small random model for each type of the library, from its config class alone.

`build(model_type)` gives a model in eval mode, the same for the same arguments. Every parameter is drawn anew,
since the library starts biases, LayerScales and some gates at values that hide a term. Nothing here touches
the global random state.
"""

from __future__ import annotations

from typing import Any

import torch
from census.catalogue import NotBuilt, category, model_class, model_types
from census.exceptions import EXCEPTIONS, Change
from census.sizes import tiny
from torch import nn
from transformers import CONFIG_MAPPING

__all__ = ["NotBuilt", "build", "category", "model_types", "randomise", "reason"]

MOST_PARAMETERS = 40_000_000  # most types have below one million, codecs up to this


def build(model_type: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A small random model of the type, in eval mode, with every parameter of order one.

    Raises NotBuilt, with the reason in one line, where the library cannot make it here.
    """
    row = EXCEPTIONS.get(model_type, Change(""))
    try:
        config = tiny(CONFIG_MAPPING[model_type], row.config, whole=row.whole)
        cls = model_class(model_type)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls._from_config(config, dtype=dtype).eval()
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(reason(error)) from error
    if (count := sum(parameter.numel() for parameter in model.parameters())) > MOST_PARAMETERS:
        raise NotBuilt(f"too large: {count / 1e6:.0f} million parameters")
    randomise(model, dtype, seed)
    if dtype is torch.float64:  # the default experts, grouped_mm, have no float64
        model.set_experts_implementation("eager")
    return model


def reason(error: BaseException) -> str:
    """An error as one line; a package that is not installed as "needs <package>"."""
    text = " ".join(str(error).split())
    for package in (
        "timm",
        "natten",
        "detectron2",
        "torchaudio",
        "torchvision",
        "mamba_ssm",
        "einops",
        "xlstm",
    ):
        if package in text and any(
            word in text for word in ("requires", "install", "No module", "not found")
        ):
            return f"needs {package}"
    return f"{type(error).__name__}: {text}"[:300]


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
