"""Sounds: files and arrays as waves at the rate that a model wants, and the features made of them.

The features of each sound are made of it alone, and only equal shapes go into one batch. So no sound is
padded to the length of another; what a feature extractor pads to a length of its own is the model's input.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import gcd
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.undo import undoing
from rc_probe.models.libraries import first_line

if TYPE_CHECKING:
    from rc_probe.models.load import Loaded

RATES = range(1000, 768_001)  # numbers a second that a sound may have; a header can claim any
WINDOW = 0.025  # seconds; feature extractors make a frame of so much, and some fail on less

Wave = np.ndarray[tuple[int], np.dtype[np.float32]]


def is_sound(value: Any) -> bool:
    """An array (N,), a pair of one and its sampling rate, or what `datasets` has for a sound."""
    if isinstance(value, Mapping):
        stored = value.get("bytes") or value.get("path")
        return {"array", "sampling_rate"} <= value.keys() or isinstance(stored, bytes | str)
    if isinstance(value, tuple | list):
        return len(value) == 2 and _is_array(value[0]) and isinstance(value[1], Real)
    return _is_array(value)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "fi"


def wave(item: Any, rate: int) -> Wave:
    """The sound as (N,) float32 in [-1, 1], `rate` numbers a second; channels are averaged.

    item: the path of a file, or what passes `is_sound`; an array without a rate has the wanted one.
    Raises RcProbeError for what cannot be read, or is not finite.
    """
    where = _name(item)
    if isinstance(item, Path):
        values, own = _read(item, where)
    elif isinstance(item, Mapping) and "array" in item:
        values, own = np.asarray(item["array"]), item["sampling_rate"]
    elif isinstance(item, Mapping):
        values, own = _read(io.BytesIO(item["bytes"] or _fetch(item["path"])), where)
    else:
        values, own = item if isinstance(item, tuple | list) else (item, rate)
    if not (_is_array(values) and isinstance(own, Real)):
        what = f"an array of shape {values.shape} and type {values.dtype} at a rate of {own} is no sound"
        raise RcProbeError(what, where=where, todo="Give a one-dimensional array of numbers and its rate")
    if not RATES[0] <= own <= RATES[-1]:
        what = f"a rate of {own:,} numbers a second is none of a sound ({RATES[0]:,} to {RATES[-1]:,})"
        raise RcProbeError(what, where=where, todo="Repair its header, or give other sounds")
    if values.dtype.kind == "i":  # as files store it
        values = values / -float(np.iinfo(values.dtype).min)
    if not np.isfinite(values).all():
        raise RcProbeError("the sound holds NaN or infinity", where=where, todo="Remove or replace it")
    return _resampled(values.astype(np.float32), round(own), rate)


def _resampled(values: Wave, own: int, rate: int) -> Wave:
    if own == rate or not len(values):
        return values
    from scipy.signal import resample_poly

    common = gcd(own, rate)
    return resample_poly(values, rate // common, own // common).astype(np.float32)  # type: ignore[no-any-return]


def _name(item: Any) -> str:
    """Where an error was."""
    path = item.get("path") if isinstance(item, Mapping) else item if isinstance(item, Path) else None
    return str(path or "a sound of the data")


def _read(file: Any, where: str) -> tuple[Any, int]:
    """(wave (N,), its rate) of a path or an open file."""
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: it is there without its C library
        todo = 'Install it: pip install "rc-probe[audio]"'
        raise RcProbeError("sounds are read with the package soundfile", where=where, todo=todo) from None
    try:
        values, rate = soundfile.read(file, dtype="float32", always_2d=True)  # (N, channels)
    except Exception as error:
        what = f"not a readable sound ({first_line(error)})"
        raise RcProbeError(what, where=where, todo="Remove or replace it") from error
    return values.mean(axis=1), int(rate)


def _fetch(path: str) -> bytes:
    """The bytes of a file, or of a part of a streamed dataset (hf://..., zip://...)."""
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return bytes(file.read())
    except Exception as error:
        what = f"the sound cannot be read ({first_line(error)})"
        raise RcProbeError(what, where=path, todo="Try again, or give a local file") from error


def features(loaded: Loaded, item: Any) -> dict[str, Tensor]:
    """What the feature extractor makes of one sound, each (1, ...), float32.

    No mask: frames that it marks as padding are cut off.
    """
    extractor, rate = _extractor(loaded)
    heard = wave(item, rate)
    name = loaded.model.main_input_name
    try:
        with _same_crops():
            made = dict(extractor(heard, sampling_rate=rate, return_tensors="pt"))
        values = made[name]  # (1, N), (1, frames, bins) or (1, bins, frames)
    except Exception as error:
        what = f"the feature extractor does not take this sound ({first_line(error)})"
        raise RcProbeError(what, where=_name(item), todo="Leave it out, or use the model's own") from error
    mask = made.pop("attention_mask", None)
    if mask is not None and mask.shape == values.shape[:2]:
        made[name] = values[:, mask[0].bool()]
    return made


def shape(loaded: Loaded, item: Any) -> tuple[int, ...] | None:
    """The shape of a sound's features; None where they make fewer than two tokens."""
    rate = _extractor(loaded)[1]
    heard = wave(item, rate)
    if len(heard) < WINDOW * rate:
        return None
    name = loaded.model.main_input_name
    found = tuple(features(loaded, heard)[name].shape)
    length = found[-1] if name == "input_values" else found[1]
    # Models whose convolutions shorten a sound say by how much.
    shorten: Any = (
        getattr(part, "_get_feat_extract_output_lengths", None) for part in loaded.model.modules()
    )
    for method in filter(None, shorten):
        after = method(torch.tensor(length))
        length = int(after[-1] if isinstance(after, tuple) else after)
        break
    return found if length >= 2 else None


def fixed_length(loaded: Loaded, item: Any) -> str:
    """A note, if the feature extractor brings every sound to one length; else ""."""
    extractor, rate = _extractor(loaded)
    heard = wave(item, rate)
    if shape(loaded, heard) != shape(loaded, np.concatenate([heard, heard])):
        return ""
    seconds = getattr(extractor, "chunk_length", None)  # Whisper's
    to = f"{seconds} s" if seconds else "one length"
    return f"The feature extractor pads or cuts every sound to {to}; silence counts as tokens"


def _extractor(loaded: Loaded) -> tuple[Any, int]:
    """(feature extractor, its sampling rate); a processor may also hold a tokenizer beside it."""
    extractor = getattr(loaded.processor, "feature_extractor", loaded.processor)
    rate = getattr(extractor, "sampling_rate", None)
    if not rate:
        what = f"{type(extractor).__name__} is no feature extractor of sounds"
        raise RcProbeError(what, where=loaded.id, todo="Give the one that belongs to the model")
    return extractor, int(rate)


@contextmanager
def _same_crops() -> Iterator[None]:
    """CLAP's extractor cuts long sounds at random places: the same ones each time; then as before."""
    before = np.random.get_state()
    with undoing(partial(np.random.set_state, before)):
        np.random.seed(0)
        yield
