"""Small inputs for the attach probe, made from a model's config when the user gives none."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from rc_probe.hooks.errors import RcProbeError

from .structure import Structure
from .tape import walk

SEQUENCES, TOKENS = 2, 16
WAVE = 8000  # half a second of sound


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Random inputs: 2 sequences of 16 tokens, or 2 images. The global random state is not used.

    Raises RcProbeError when the config does not say what the model takes.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    image, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    inputs: dict[str, Any] = {}
    if name == "input_ids" and vocabulary:
        limit = getattr(text, "max_position_embeddings", None) or TOKENS
        limit = limit if limit > 0 else TOKENS  # XLNet says -1: no limit
        ids = torch.randint(
            min(5, vocabulary - 1), vocabulary, (SEQUENCES, min(TOKENS, limit)), generator=generator
        )
        inputs["input_ids"] = ids.to(device)
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids.to(device)
    elif name == "pixel_values":
        image = image or 224
        size = tuple(image) if isinstance(image, (tuple, list)) else (image, image)
        pixels = torch.randn(SEQUENCES, channels, *size, generator=generator)
        inputs["pixel_values"] = pixels.to(device, dtype)
    elif name == "input_values" and not getattr(config, "num_mel_bins", None):
        wave = torch.randn(SEQUENCES, WAVE, generator=generator)  # sound as it is sampled
        inputs[name] = wave.to(device, dtype)
    elif name == "input_features" and getattr(config, "max_source_positions", None):
        frames = 2 * config.max_source_positions  # Whisper halves them by a stride
        inputs[name] = torch.randn(SEQUENCES, config.num_mel_bins, frames, generator=generator).to(
            device, dtype
        )
    else:
        raise RcProbeError(
            f"no example input can be made from the config (main input {name!r})",
            where=type(model).__name__,
            todo="Give inputs=: the keyword arguments of a forward pass with two or more samples",
        )
    return inputs


def with_no_cache(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` with use_cache=False where the model takes it: replayed blocks must not fill a cache."""
    takes = inspect.signature(model.forward).parameters
    if "use_cache" in takes or ("kwargs" in takes and _has_cache(getattr(model, "config", None))):
        return {**inputs, "use_cache": False}
    return inputs


def _has_cache(config: Any) -> bool:
    """Whether the config, or that of a part of the model, speaks of a cache."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return hasattr(config, "use_cache") or any(part is not None and _has_cache(part) for part in parts)


def small(inputs: dict[str, Any], *, tokens: int | None = TOKENS, apart: bool = False) -> dict[str, Any]:
    """The first 2 sequences and 16 tokens (None: all) of a real batch, enough to attach with.

    Images keep their size, and so do texts that come with images or sounds. Inputs whose first axes
    differ (patches of several images in one row) are left as they are. A batch of one sample is doubled, so that the batch axis shows; texts of
    two tokens come three times, so that it differs from the tokens. `apart` takes one sample more and one token less, for
    a model one axis of whose stream is as long as another.
    """
    batch = batch_size(inputs)
    if any(t.ndim and t.shape[0] != batch for _, t in walk(inputs)):
        return inputs
    ids = inputs.get("input_ids")
    alone = not any(t.is_floating_point() and t.ndim > 2 for _, t in walk(inputs))
    length = ids.shape[1] if alone and isinstance(ids, Tensor) and ids.ndim == 2 else None
    wanted = SEQUENCES + 1 if apart or length == SEQUENCES else SEQUENCES
    most = None if tokens is None or length is None else min(length, tokens) - apart

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != batch:
            return value
        repeats = -(-wanted // batch)
        value = value.repeat(repeats, *[1] * (value.ndim - 1))[:wanted] if repeats > 1 else value[:wanted]
        for axis in range(1, value.ndim):
            if most is not None and value.shape[axis] == length:
                value = value.narrow(axis, 0, most)
        return value

    return {key: cut(value) for key, value in inputs.items()}


def batch_size(inputs: dict[str, Any]) -> int:
    """Samples in a batch: rows of the texts, else the size of every first axis; 0 where these differ."""
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor):
        return ids.shape[0]
    sizes = {t.shape[0] for _, t in walk(inputs) if t.ndim}
    return sizes.pop() if len(sizes) == 1 else 0


def signature(inputs: dict[str, Any]) -> tuple[Any, ...]:
    """What kind of inputs these are, without their sizes."""
    return tuple(sorted((str(path), t.ndim, str(t.dtype)) for path, t in walk(inputs)))


_examples: weakref.WeakKeyDictionary[Structure, dict[str, Any]] = weakref.WeakKeyDictionary()


def keep_example(structure: Structure, inputs: dict[str, Any]) -> None:
    """The small inputs that a structure was proved on, for what is read of it later."""
    _examples[structure] = inputs


def example_of(structure: Structure) -> dict[str, Any]:
    """RcProbeError where it was not proved on any."""
    if structure not in _examples:
        where = type(structure.model).__name__
        raise RcProbeError("the inputs that it was proved on are gone", where=where, todo="Attach again")
    return _examples[structure]
