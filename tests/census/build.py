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
from support.random_models import make, randomise
from transformers import CONFIG_MAPPING

__all__ = ["NotBuilt", "build", "category", "model_types", "reason"]

MOST_PARAMETERS = 40_000_000  # most types have below one million, codecs up to this


def build(model_type: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A small random model of the type, in eval mode, with every parameter of order one.

    Raises NotBuilt, with the reason in one line, where the library cannot make it here.
    """
    row = EXCEPTIONS.get(model_type, Change(""))
    try:
        config = tiny(CONFIG_MAPPING[model_type], row.config, whole=row.whole)
        cls = model_class(model_type)
        model = make(cls, config, dtype, seed)
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(reason(error)) from error
    if (count := sum(parameter.numel() for parameter in model.parameters())) > MOST_PARAMETERS:
        raise NotBuilt(f"too large: {count / 1e6:.0f} million parameters")
    randomise(model, dtype, seed)
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
