"""Two small models that differ in known places, and their difference by plain hooks, NumPy and float64."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from support import tiny
from support.random_models import randomise
from torch import nn

TEXTS = [tiny.words(14), tiny.words(5, 3), tiny.words(9, 5), tiny.words(11, 2)]


def gpt2(layers: int = 3, width: int = 16, seed: int = 0, **changes: Any) -> Any:
    """A decoder with its head, every weight random."""
    sizes = tiny.GPT2_SIZES | {"n_layer": layers, "n_embd": width} | changes
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    randomise(model, torch.float32, seed)
    return model


def perturbed(model: Any, path: str, size: float) -> Any:
    """A copy in which the weight at `path` is `size` (relative) off."""
    other = copy.deepcopy(model)
    weight = other.get_parameter(path)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        weight += size * weight.norm() / noise.norm() * noise
    return other


def encoded(texts: list[str]) -> list[torch.Tensor]:
    """Each text alone, (1, tokens): without any padding."""
    processor = tiny.tokenizer()
    return [torch.tensor([processor(text)["input_ids"]]) for text in texts]


def streams(model: Any, ids: torch.Tensor) -> list[np.ndarray]:
    """(tokens, dim) float64 of layers 0 … L, by plain hooks on the blocks of a GPT-2."""
    double, found = copy.deepcopy(model).double(), list[np.ndarray]()
    blocks = double.transformer.h
    blocks[0].register_forward_pre_hook(lambda _, args: found.append(args[0][0].numpy()))
    for block in blocks:
        block.register_forward_hook(lambda *a: found.append(_tensor(a[-1])[0].numpy()))
    with torch.no_grad():
        double(ids)
    return found


def relative(a: np.ndarray, b: np.ndarray, whole: np.ndarray | None = None) -> float:
    return float(np.linalg.norm(b - a) / np.linalg.norm(a if whole is None else whole))


def bulk(x: np.ndarray) -> np.ndarray:
    """Which rows are not over five times the median norm."""
    norms = np.linalg.norm(x, axis=1)
    return np.asarray(norms <= 5 * np.median(norms))


def values(found: Any, component: str, metric: str) -> list[float]:
    """The means of a metric, in the order of the table."""
    rows = found.differences
    return [float(x) for x in rows[(rows["component"] == component) & (rows["metric"] == metric)]["mean"]]


@contextmanager
def recorded(
    modules: dict[str, nn.Module], given: Callable[[str, Any], Any] | None = None
) -> Iterator[dict[str, Any]]:
    """What goes into modules (`name.in`) and out of them; `given` may put another input in its place."""
    seen: dict[str, Any] = {}
    handles = []

    def before(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            args = args if given is None else given(name, args)
            seen[f"{name}.in"] = args[0][0].numpy()
            return args

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = _tensor(output)[0].numpy()

        return hook

    for name, module in modules.items():
        handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tensor(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found
