"""Samples as the inputs of a model, in batches, such that no number depends on how they were batched.

Texts are padded on the right to the longest of their batch, and masked. On the right even where the
tokenizer would pad on the left: a text then has the positions that it has alone, whatever the model makes
of position ids, and causal attention never meets the padding at all. Sounds are never padded: a batch holds equal shapes.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.example_inputs import batch_size
from rc_probe.models.libraries import first_line
from rc_probe.models.load import Loaded
from rc_probe.models.model_inputs import accepts, input_device
from rc_probe.results.words import THINGS

from .samples import Samples, open_image
from .sounds import features, fixed_length, shape
from .tokens import Ids, at_most, length_of, tokenize


@dataclass(frozen=True)
class Batch:
    """inputs: the model's keyword arguments, on its device; mask: (B, T) bool, None if all is real.

    start: the number of its first sample in the data, from 0
    before: the batch as it was made, where `mask` is that of a stream to which the model added tokens
    """

    inputs: dict[str, Tensor]
    mask: Tensor | None
    start: int = 0
    before: Batch | None = None

    @property
    def as_made(self) -> Batch:
        """With the mask of its inputs."""
        return self.before or self


def part_of(batch: Batch, rows: slice, tokens: int | None = None) -> Batch:
    """Some samples of a batch, or the first tokens of some."""
    size, ids = batch_size(batch.inputs), batch.inputs.get("input_ids")
    known = ids if batch.mask is None else batch.mask
    length = known.shape[1] if known is not None and known.ndim == 2 else None

    def part(x: Tensor) -> Tensor:
        x = x[rows] if x.ndim and x.shape[0] == size else x
        return x[:, :tokens] if tokens and x.shape[1:2] == (length,) else x

    inputs = {name: part(x) if isinstance(x, Tensor) else x for name, x in batch.inputs.items()}
    return Batch(inputs, None if batch.mask is None else part(batch.mask), batch.start + rows.start)


class Batches:
    """The batches of a run, made anew by each iteration; `len` is their number.

    length: tokens at most in a text, after the model's own limit; None for images and sounds
    longest: tokens of the longest text; None for images and sounds
    tokens: real tokens in all; None for images and sounds (the model makes them)
    truncated: how many texts were cut to `length`
    note: for the reader, "" if nothing to say
    """

    def __init__(self, loaded: Loaded, items: list[Any], batch_size: int) -> None:
        self.loaded, self.items = loaded, items
        self.length: int | None = None
        self.longest: int | None = None
        self.tokens: int | None = None
        self.truncated, self.note = 0, ""
        self.slices: list[list[Any]] = []
        shapes = _shapes(loaded, items)
        for i, item in enumerate(items):
            if i and len(self.slices[-1]) < batch_size and shapes[i] == shapes[i - 1]:
                self.slices[-1].append(item)
            else:
                self.slices.append([item])

    def __len__(self) -> int:
        return len(self.slices)

    def __iter__(self) -> Iterator[Batch]:
        return self.of(range(len(self)))

    def on(self, loaded: Loaded) -> Batches:
        """The same batches for the same model with other weights, or with none for the time being."""
        made = copy.copy(self)
        made.loaded = loaded
        return made

    def of(self, numbers: Sequence[int]) -> Iterator[Batch]:
        """The batches with these numbers, from 0; only these are made."""
        make = {"text": _text_batch, "image": _image_batch, "audio": _sound_batch}[self.loaded.modality]
        starts = [0, *itertools.accumulate(map(len, self.slices))]
        return (replace(make(self.loaded, self.slices[n]), start=starts[n]) for n in numbers)


def batches(
    samples: Samples, loaded: Loaded, *, length: int = 128, batch_size: int = 8, special_tokens: bool = True
) -> Batches:
    """The batches of `samples` for `loaded.model`, in the order of the samples.

    Texts are cut to `length` tokens, or to what the model's positions allow. `special_tokens=False` leaves
    out what the tokenizer adds to a text ([CLS], [SEP], ...). Encoder-decoder models get the text, shifted
    right by one, as the decoder's input.

    Raises RcProbeError for texts and sounds of fewer than two tokens, and for unknown token ids.
    """
    if samples.kind != loaded.modality:
        what = f"the model takes {THINGS[loaded.modality]}, and the samples are {THINGS[samples.kind]}"
        raise RcProbeError(what, where=loaded.id, todo="Give other --data")
    if samples.kind != "text":
        made = Batches(loaded, samples.items, batch_size)
        made.note = fixed_length(loaded, samples.items[0]) if samples.kind == "audio" else ""
        return made
    cut = at_most(loaded, length)
    # One token more than is kept tells whether a text was cut.
    longer = tokenize(loaded.processor, samples.items, cut + 1, special_tokens)
    encoded = tokenize(loaded.processor, samples.items, cut, special_tokens)
    _check_ids(encoded, loaded, samples.source)
    made = Batches(loaded, encoded, batch_size)
    lengths = [length_of(text) for text in encoded]
    made.length, made.longest, made.tokens = cut, max(lengths), sum(lengths)
    made.truncated = sum(length_of(text) > cut for text in longer)
    if cut < length and made.truncated:
        made.note = f"--length cut from {length} to {cut}, all the positions that the model has"
    return made


def long_enough(loaded: Loaded, special_tokens: bool = True) -> Callable[[Any], bool] | None:
    """For load_samples: whether a sample has the two tokens that a residual needs; None for images."""
    if loaded.modality == "audio":
        return lambda sound: shape(loaded, sound) is not None
    if loaded.modality == "image":
        return None
    return lambda text: length_of(tokenize(loaded.processor, [text], 4, special_tokens)[0]) >= 2


def _shapes(loaded: Loaded, items: list[Any]) -> list[Any]:
    """For each sample, what must be equal within a batch: where no mask is given there is no padding."""
    if loaded.modality == "audio":
        shapes = [shape(loaded, sound) for sound in items]
        if None in shapes:
            what = (
                f"sound {shapes.index(None)} has fewer than two tokens, and one cannot collapse onto another"
            )
            raise RcProbeError(what, where=loaded.id, todo="Leave it out, or give longer sounds")
        return shapes
    if loaded.modality == "text" and not accepts(loaded.model, "attention_mask"):
        return [length_of(text) for text in items]
    return [None] * len(items)


def _check_ids(encoded: list[Ids], loaded: Loaded, source: str) -> None:
    if any(length_of(text) < 2 for text in encoded):
        which = next(i for i, text in enumerate(encoded) if length_of(text) < 2)
        what = f"text {which} has fewer than two tokens, and one token cannot collapse onto another"
        raise RcProbeError(what, where=source, todo="Leave it out, or give longer texts")
    embedding = loaded.model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    largest = max(max(text["input_ids"]) for text in encoded)
    if rows is not None and largest >= rows:
        what = f"the tokenizer makes token {largest}, the model knows {rows}"
        raise RcProbeError(what, where=loaded.id, todo="Use the tokenizer that belongs to the model")


def _text_batch(loaded: Loaded, texts: list[Ids]) -> Batch:
    model, tokenizer = loaded.model, loaded.processor
    device = input_device(model)
    lengths = torch.tensor([length_of(text) for text in texts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T)
    fill = {"input_ids": _pad_id(tokenizer), "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    inputs = {}
    for key in texts[0]:
        table = torch.full(mask.shape, fill[key])
        table[mask] = torch.tensor([value for text in texts for value in text[key]])
        inputs[key] = table
    inputs["attention_mask"] = mask.long()
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _shifted(model, inputs["input_ids"])
        inputs["decoder_attention_mask"] = mask.long()  # one token more in front, the last one less
    inputs = {key: value.to(device) for key, value in inputs.items() if accepts(model, key)}
    return Batch(inputs, None if bool(mask.all()) else mask.to(device))


def _pad_id(tokenizer: Any) -> int:
    """Any token does, as it is masked; the pad token where there is one: RoBERTa skips its positions."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if found is not None:
            return int(found)
    return 0


def _shifted(model: Any, ids: Tensor) -> Tensor:
    """The decoder's input (B, T): a start token, then the text without its last token."""
    if hasattr(
        model, "prepare_decoder_input_ids_from_labels"
    ):  # mBART starts with the language, which is last
        return model.prepare_decoder_input_ids_from_labels(labels=ids)  # type: ignore[no-any-return]
    config = model.config
    starts = (
        getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    )
    start = next((token for token in starts if token is not None), 0)
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)


def _image_batch(loaded: Loaded, items: list[Any]) -> Batch:
    model = loaded.model
    images = [_converted(item, _mode(loaded)) for item in items]
    try:
        made = loaded.processor(images=images, return_tensors="pt")
    except Exception as error:
        what = f"the image processor does not take these images ({first_line(error)})"
        raise RcProbeError(what, where=loaded.id, todo="Try --batch-size 1, or other images") from error
    return Batch(_taken(model, made), None)


def _sound_batch(loaded: Loaded, items: list[Any]) -> Batch:
    made = [features(loaded, item) for item in items]
    return Batch(_taken(loaded.model, {key: torch.cat([one[key] for one in made]) for key in made[0]}), None)


def _taken(model: Any, made: Any) -> dict[str, Tensor]:
    """What the model takes of `made`, on its device and in its dtype."""
    device = input_device(model)
    inputs = {key: value.to(device) for key, value in made.items() if accepts(model, key)}
    return {
        key: value.to(model.dtype) if value.is_floating_point() else value for key, value in inputs.items()
    }


def _mode(loaded: Loaded) -> str:
    """Pillow's name for images with as many channels as the model takes."""
    channels = getattr(loaded.config, "num_channels", None) or getattr(loaded.model.config, "num_channels", 3)
    if channels not in (1, 3):
        what = f"the model takes images of {channels} channels, and images are read with 3 or 1"
        raise RcProbeError(what, where=loaded.id, todo="Choose a model of RGB or grey images")
    return "L" if channels == 1 else "RGB"


def _converted(item: Any, mode: str) -> Any:
    """The image, the right way up, with 8 bits a channel; `item` is a PIL image or the path of one."""
    from PIL import Image, ImageOps

    image = item if isinstance(item, Image.Image) else open_image(item)
    try:
        with warnings.catch_warnings(action="ignore"):  # about tags that are damaged
            return _eight_bits(ImageOps.exif_transpose(image), image.format, str(item)[:200]).convert(mode)
    except RcProbeError:
        raise
    except Exception as error:  # decoded only now; each format has errors of its own
        what = f"not a readable image ({first_line(error)})"
        raise RcProbeError(what, where=str(item)[:200], todo="Remove or replace it") from error
    finally:
        if image is not item:
            image.close()


def _eight_bits(image: Any, file_format: str | None, where: str) -> Any:
    """A grey image of 16 bits with 8, white as white; Pillow's own conversion makes all over 255 white."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and file_format == "PNG"):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        what = f"pixels of mode {image.mode!r} have no known white"
        raise RcProbeError(what, where=where, todo="Convert it to 8 or 16 bits")
    return image
