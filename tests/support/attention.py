"""Families of the zoo, attached, and their attention patterns."""

from typing import Any

import torch
from support import zoo
from torch import Tensor

from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.attention_patterns import patterns
from rc_probe.hooks.structure.structure import Structure

OUTPUT = {  # the output projection, whose input is the heads side by side
    "bert": "attention.output.dense", "roberta": "attention.output.dense", "electra": "attention.output.dense",
    "distilbert": "attention.out_lin", "albert": "attention.dense", "mpnet": "attention.attn.o",
    "deberta_v2": "attention.output.dense", "xlnet": "rel_attn", "modernbert": "attn.Wo",
    "t5_encoder": "layer.0.SelfAttention.o", "gpt2": "attn.c_proj", "opt": "self_attn.out_proj",
    "opt_post_norm": "self_attn.out_proj", "gpt_neox": "attention.dense", "gptj": "attn.out_proj",
    "bloom": "self_attention.dense", "falcon": "self_attention.dense", "falcon_new": "self_attention.dense",
    "llama": "self_attn.o_proj", "mistral": "self_attn.o_proj", "qwen3": "self_attn.o_proj",
    "gemma2": "self_attn.o_proj", "phi": "self_attn.dense", "mixtral": "self_attn.o_proj",
    "olmo2": "self_attn.o_proj", "vit": "attention.o_proj", "dinov2": "attention.o_proj",
    "beit": "attention.o_proj", "clip_vision": "self_attn.out_proj", "swin": "attention.o_proj",
}  # fmt: skip
FEW = ["bert", "gpt2", "llama", "gemma2", "falcon", "bloom"]  # interface sdpa and eager, both interceptions


def attached(name: str, **how: Any) -> tuple[Any, Any, Structure]:
    model, inputs = zoo.build(name, **how)
    return model, inputs, find_structure(model, inputs)


@torch.no_grad()
def run(model: Any, inputs: Any) -> Tensor:
    out: Tensor = model(**inputs)[0]
    return out


def seen(structure: Structure, inputs: Any) -> list[Tensor]:
    """The patterns of a pass, in the order in which they come."""
    found: list[Tensor] = []
    with patterns(structure, lambda block, branch, pattern: found.append(pattern)):
        run(structure.model, inputs)
    return found
