"""A tokenizer of whole words."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def word_tokenizer(vocabulary: dict[str, int], unknown: str | None = None) -> Any:
    """A `tokenizers.Tokenizer`: lower-case words and marks, as BERT splits them. unknown: the word for all others."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    made = Tokenizer(models.WordLevel(vocabulary, **({} if unknown is None else {"unk_token": unknown})))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


def save_texts(tokenizer: Any, texts: list[str], folder: Path, **names: str) -> None:
    """The tokenizer beside the model in `folder`, and the texts, one a line, so that `rc-probe` measures the model on them.

    names: of special tokens, such as pad_token
    """
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in texts), "utf-8")
