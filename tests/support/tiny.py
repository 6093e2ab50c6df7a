"""Tiny models in folders, with tokenizers of a few words, for the tests of loading and batching."""

from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(28))]
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5_SIZES = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
VIT_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32} | {
    "image_size": 8,
    "patch_size": 4,
}


def words(count: int, step: int = 1) -> str:
    """A text of `count` words of the vocabulary."""
    return " ".join(f"w{i * step % 28}" for i in range(count))


def tokenizer(*, pad: bool = True, special: bool = True, **options: Any) -> Any:
    rust = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        around = [("[CLS]", 1), ("[SEP]", 2)]
        rust.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[SEP]"}
    names |= {"pad_token": "[PAD]"} if pad else {}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=rust, **names, **options)


def bert(cls: str = "BertModel", **changes: Any) -> Any:
    return getattr(transformers, cls)(transformers.BertConfig(**(SIZES | changes)))


def saved(folder: Path, model: Any, processor: Any = None) -> str:
    """The folder, with the model and its processor in it."""
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return str(folder)
