"""A tokenizer of whole words."""

from __future__ import annotations

from typing import Any


def word_tokenizer(vocabulary: dict[str, int], unknown: str | None = None) -> Any:
    """A `tokenizers.Tokenizer`: lower-case words and marks, as BERT splits them. unknown: the word for all others."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    made = Tokenizer(models.WordLevel(vocabulary, **({} if unknown is None else {"unk_token": unknown})))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made
