"""The rounding of models that compute in fewer bits than their floats have: activations rounded to integers.

Their floor is measured, by two passes that differ by rounding alone: the model's own, and one in which each quantised
linear map multiplies the same weights in floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rc_probe.data.batches import Batch
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.edits.stream_taps import each_stream
from rc_probe.hooks.structure.example_inputs import example_inputs, small
from rc_probe.hooks.structure.structure import Structure, decodes
from rc_probe.hooks.undo import hook

from .variant_passes import stream_pass


def quantised(model: nn.Module) -> dict[str, nn.Module]:
    """The linear maps whose weights are no plain floats but can be written as such, by name."""
    return {name: module for name, module in model.named_modules() if _weight(module) is not None}


def name_of_rounding(model: nn.Module) -> str:
    """What the weights of its quantised maps are called; "" where it has none."""
    kinds = {type(module.weight.data).__name__ for module in quantised(model).values()}
    return ", ".join(sorted(kinds))


def _weight(module: nn.Module) -> Any:
    """What writes the weights of a quantised map (torchao's) in floating point; None for all else."""
    stored = getattr(getattr(module, "weight", None), "data", None)
    if not hasattr(module, "in_features") or not isinstance(stored, Tensor) or type(stored) is Tensor:
        return None
    return getattr(stored, "dequantize", None)


@contextmanager
def _in_floats(model: nn.Module) -> Iterator[None]:
    """Inside, quantised maps multiply their weights in floating point."""

    def instead(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return nn.functional.linear(args[0], _weight(module)().to(args[0].dtype), module.bias)

    with ExitStack() as stack:
        for module in quantised(model).values():
            stack.enter_context(hook(module.register_forward_hook, instead))
        yield


def measured_noise(
    structure: Structure, batch: Batch, edits: Mapping[str, Edits]
) -> dict[str, dict[int, float]]:
    """By variant and layer, how far rounding moves a token against the others, relative to its length; {} without any.

    The root mean square over the real tokens of `batch` of ‖δ_i − δ̄‖ / ‖x_i‖, δ the difference of both passes: what
    moves all tokens of a sample alike is in no residual.
    """
    if not quantised(structure.model):
        return {}
    return {name: _by_layer(_differing(structure, batch, edit), batch.mask) for name, edit in edits.items()}


def noise_by_stream(structure: Structure, batch: Batch) -> dict[int, dict[int, float]]:
    """The same of the plain model, by layer, of each of several streams side by side by its number, and 0: of all together."""
    if not quantised(structure.model):
        return {}
    both, count = _differing(structure, batch, Edits()), structure.streams
    found = {0: _by_layer(both, batch.mask)}
    for number in range(count if count > 1 else 0):
        one = {layer: tuple(each_stream(x, count)[number] for x in pair) for layer, pair in both.items()}
        found[number + 1] = _by_layer(one, batch.mask)
    return found


def noise_on(structure: Structure, inputs: dict[str, Any] | None) -> dict[int, dict[int, float]]:
    """`noise_by_stream` on keyword arguments of the model's forward; without them on random ones."""
    if not quantised(structure.model):
        return {}
    given = small(example_inputs(structure.model) if inputs is None else inputs, tokens=None)
    mask = given.get("decoder_attention_mask" if decodes(structure) else "attention_mask")
    return noise_by_stream(
        structure, Batch(given, mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None)
    )


def _differing(structure: Structure, batch: Batch, edits: Edits) -> dict[int, tuple[Tensor, ...]]:
    """By layer the stream of the model's own pass, and of one that differs by rounding alone."""
    with measuring(structure.model):
        own = _streams(structure, batch, edits)
        with _in_floats(structure.model):
            other = _streams(structure, batch, edits)
    return {layer: (own[layer], other[layer]) for layer in own}


def _by_layer(both: Mapping[int, tuple[Tensor, ...]], mask: Tensor | None) -> dict[int, float]:
    return {layer: _moved(x, y, mask) for layer, (x, y) in both.items()}


def _streams(structure: Structure, batch: Batch, edits: Edits) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    keep: Callable[[int, Tensor], None] = lambda layer, x: found.update({layer: x.double()})  # noqa: E731
    stream_pass(structure, batch.inputs, edits, keep)
    return found


def _moved(x: Tensor, y: Tensor, mask: Tensor | None) -> float:
    real = (
        torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if mask is None
        else mask.bool().to(x.device)
    )
    delta = (x - y) * real[..., None]
    delta = delta - delta.sum(1, keepdim=True) / real.sum(1).clamp_min(1)[:, None, None]
    ratio = delta.norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-300)
    return float(ratio[real].square().mean().sqrt())
