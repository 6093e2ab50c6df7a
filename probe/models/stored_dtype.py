"""In which floating type a checkpoint holds its weights: read off the heads of its files, whatever config.json says."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .locate import Source

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Of the format (ggml/docs/gguf.md): types of tensors, bytes of the values of metadata by type; a string (8) says its own.
GGUF_FLOATS = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
GGUF_ARRAY = 9


def stored_dtype(source: Source) -> torch.dtype | str:
    """The floating dtype that most numbers of the checkpoint have; "auto", which leaves it to transformers, for pickles.

    Numbers of a GGUF file that are in none of them (Q4_1, …) are de-quantised, to float32.
    """
    with source.explain("the weights are corrupt or incomplete", "Download or save the model again"):
        counts = _of_gguf(source) if source.gguf else _of_safetensors(source)
    return max(counts, key=lambda dtype: counts[dtype], default="auto")


def _of_gguf(source: Source) -> Counter[Any]:
    counts: Counter[Any] = Counter()
    with (Path(source.place) / source.options["gguf_file"]).open("rb") as file:
        for kind, numbers in _gguf_tensors(file):
            counts[GGUF_FLOATS.get(kind, torch.float32)] += numbers
    return counts


def _gguf_tensors(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """(type, how many numbers) of each tensor. gguf's own reader takes seconds for the words of a tokenizer."""

    def number(form: str = "Q") -> int:
        (found,) = struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))
        return int(found)

    def skip(kind: int) -> None:
        if kind == GGUF_ARRAY:
            inner, count = number("I"), number()
            if inner in GGUF_SIZES:
                file.seek(GGUF_SIZES[inner] * count, 1)
            else:
                for _ in range(count):
                    skip(inner)
        else:
            file.seek(GGUF_SIZES[kind] if kind in GGUF_SIZES else number(), 1)

    file.seek(8)  # magic, version
    tensors, entries = number(), number()
    for _ in range(entries):
        file.seek(number(), 1)
        skip(number("I"))
    for _ in range(tensors):
        file.seek(number(), 1)
        count = prod(number() for _ in range(number("I")))
        yield number("I"), count
        number()  # its place


def _of_safetensors(source: Source) -> Counter[Any]:
    counts: Counter[Any] = Counter()
    for file in _files(source):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - no mapping
                one = weights.get_slice(name)
                if one.get_dtype() in FLOATS:
                    counts[FLOATS[one.get_dtype()]] += prod(one.get_shape())
    return counts


def _files(source: Source) -> list[str]:
    """Of one file or of shards; of a Hub model they are downloaded, as loading it would."""
    if (whole := _file(source, SAFE_WEIGHTS_NAME)) is not None:
        return [whole]
    index = _file(source, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [found for name in shards if (found := _file(source, name)) is not None]


def _file(source: Source, name: str) -> str | None:
    options = {key: value for key, value in source.options.items() if key != "trust_remote_code"}
    found: str | None = cached_file(
        source.place, name, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, **options,
    )  # fmt: skip
    return found
