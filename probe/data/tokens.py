"""Texts as tokens: how many of a text are read, and which part of it these are."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.undo import undoing
from rc_probe.models.libraries import first_line
from rc_probe.models.load import Loaded

Ids = dict[str, list[int]]


def max_length(loaded: Loaded) -> int | None:
    """How many tokens the model has positions for, or None if it has no limit."""
    config = loaded.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    limits = [getattr(config, name, None) for name in names]
    limits.append(getattr(loaded.processor, "model_max_length", None))  # 1e30 stands for no limit
    found = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < 1e9]
    # RoBERTa and its kin count positions from padding_idx + 1, in a table that has a padding row.
    for name, module in loaded.model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            found.append(module.num_embeddings - module.padding_idx - 1)
    return min(found, default=None)


def tokenize(tokenizer: Any, texts: list[str], length: int, special_tokens: bool) -> list[Ids]:
    """input_ids, and token_type_ids if the tokenizer makes them, of each text, at most `length` of them."""
    try:
        with _as_before(tokenizer):
            made = tokenizer(
                texts, truncation=True, max_length=length, add_special_tokens=special_tokens, padding=False,
                return_attention_mask=False,
            )  # fmt: skip
    except Exception as error:  # its files may hold anything
        what = f"the tokenizer fails ({first_line(error)})"
        where = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise RcProbeError(what, where=where, todo="Check its files, or give another") from error
    keys = [key for key in ("input_ids", "token_type_ids") if key in made]
    return [{key: list(made[key][i]) for key in keys} for i in range(len(texts))]


@contextmanager
def _as_before(tokenizer: Any) -> Iterator[None]:
    """A call sets the tokenizer's truncation and padding for good, even in what save_pretrained writes."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = getattr(rust, "truncation", None), getattr(rust, "padding", None)

    def back() -> None:
        if rust is not None:
            rust.enable_truncation(**truncation) if truncation else rust.no_truncation()
            rust.enable_padding(**padding) if padding else rust.no_padding()

    with undoing(back):
        yield


def length_of(text: Ids) -> int:
    return len(text["input_ids"])


def what_is_read(
    texts: list[str], loaded: Loaded, *, length: int = 128, special_tokens: bool = True
) -> list[str]:
    """The beginning of each text that `batches` keeps of it, as text."""
    cut = at_most(loaded, length)
    longer = tokenize(loaded.processor, texts, cut + 1, special_tokens)
    return [
        _beginning(text, cut, loaded, special_tokens) if length_of(ids) > cut else text
        for text, ids in zip(texts, longer, strict=True)
    ]


def _beginning(text: str, tokens: int, loaded: Loaded, special_tokens: bool) -> str:
    """As many letters as `tokens` hold."""

    def count(end: int) -> int:
        return length_of(tokenize(loaded.processor, [text[:end]], tokens + 1, special_tokens)[0])

    most = tokens
    while most < len(text) and count(most) <= tokens:
        most *= 2
    return text[: bisect.bisect_right(range(1, min(most, len(text)) + 1), tokens, key=count)]


def at_most(loaded: Loaded, length: int) -> int:
    """Tokens of a text: `length`, or what the model's positions allow."""
    return min(length, max_length(loaded) or length)
