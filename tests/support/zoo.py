"""Small random models of the transformers library, with inputs and with what structure discovery must find.

`build(name)` gives a model in eval mode and a batch for it, the same for the same arguments. Every parameter
is drawn anew after construction, since the library starts biases, LayerScales and some gains at values that
hide a term (zeros, or 1e-5). Nothing here touches the global random state.

A signature reads as in the docs: `A` attention, `M` mlp, `n` a norm after the junction, `|` next junction,
`+` branches of one junction (parallel). Each was read off the library's modeling file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from support.random_models import make, randomise
from torch import Tensor

VOCAB = 100
FIRST_ID = 10  # ids below are left to padding and special tokens
Inputs = dict[str, Tensor]

# The names for width and depth differ by family; the sizes do not: 32 wide, 4 heads of 8, 3 blocks.
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
LLAMA = BERT | {"num_key_value_heads": 2}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Family:
    """One model of the zoo: how it is made and what is in it."""

    cls: str  # class of transformers
    config: Mapping[str, Any]
    signature: str | None  # of every block; None: not a transformer
    paths: tuple[str, ...] = ()  # module of each block call, in order of the calls
    modality: str = "text"  # or "image"
    padding_side: str = "right"
    extra: Callable[[Inputs], Inputs] | None = field(default=None, repr=False)  # further inputs
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16)  # that the library can
    note: str = ""  # what discovery must cope with, and where it stands

    @property
    def blocks(self) -> int:
        """Number of block calls in one forward pass."""
        return len(self.paths)


def _each(path: str, count: int = 3) -> tuple[str, ...]:
    return tuple(path.format(index) for index in range(count))


def _segments(inputs: Inputs) -> Inputs:
    """Two segments: the second half of each text is the other one."""
    ids = inputs["input_ids"]
    second = torch.arange(ids.shape[1]) >= ids.shape[1] // 2
    return {"token_type_ids": second.long().expand(ids.shape).contiguous()}


def _two_streams(inputs: Inputs) -> Inputs:
    """XLNet's query stream: the last two tokens are predicted, and no token sees them."""
    B, T = inputs["input_ids"].shape
    perm_mask = torch.zeros(B, T, T)
    perm_mask[:, :, -2:] = 1
    target_mapping = torch.zeros(B, 2, T)
    target_mapping[:, [0, 1], [T - 2, T - 1]] = 1
    return _segments(inputs) | {"perm_mask": perm_mask, "target_mapping": target_mapping}


_XLNET = {"vocab_size": VOCAB, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
_DEBERTA = BERT | {
    "num_hidden_layers": 2,
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 64,
}
_BLOOM = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 3, "n_head": 4}
_FALCON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 3,
    "d_ff": 64,
    "relative_attention_num_buckets": 8,
}

ZOO: dict[str, Family] = {
    # Encoders of text, norm after the junction
    "bert": Family("BertModel", BERT, "An|Mn", _each("encoder.layer.{}"), extra=_segments),
    "roberta": Family(
        "RobertaModel",
        BERT,
        "An|Mn",
        _each("encoder.layer.{}"),
        note="positions are counted from the ids: a pad id in the text moves them",
    ),
    "distilbert": Family(
        "DistilBertModel",
        {
            "vocab_size": VOCAB,
            "dim": 32,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 64,
            "max_position_embeddings": 64,
        },
        "An|Mn",
        _each("transformer.layer.{}"),
        note="both norms belong to the block itself",
    ),
    "albert": Family(
        "AlbertModel",
        BERT | {"embedding_size": 16},
        "An|Mn",
        ("encoder.albert_layer_groups.0.albert_layers.0",) * 3,
        note="one module called three times; the stream starts after the 16 -> 32 mapping",
    ),
    "albert_groups": Family(
        "AlbertModel",
        BERT | {"embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2},
        "An|Mn",
        tuple(
            f"encoder.albert_layer_groups.{group}.albert_layers.{inner}"
            for group in (0, 0, 1, 1)
            for inner in (0, 1)
        ),
        note="four calls of two groups with two layers each: eight block calls of four modules",
    ),
    "xlnet": Family(
        "XLNetModel",
        _XLNET,
        "An|Mn",
        _each("layer.{}", 2),
        padding_side="left",
        extra=_segments,
        note="time first: the stream is (T, B, D); a block returns a tuple whose second stream is None",
    ),
    "xlnet_two_streams": Family(
        "XLNetModel",
        _XLNET,
        "An|Mn",
        _each("layer.{}", 2),
        padding_side="left",
        extra=_two_streams,
        dtypes=(torch.float32,),  # the position encoding stays float32
        note="a block returns the streams h (T, B, D) and g (targets, B, D); An|Mn holds for each, "
        "with the same weights; the model's output is g",
    ),
    "electra": Family(
        "ElectraModel",
        BERT | {"embedding_size": 16},
        "An|Mn",
        _each("encoder.layer.{}"),
        note="embeddings_project 16 -> 32 comes after the embedding norm",
    ),
    "deberta_v2": Family(
        "DebertaV2Model",
        _DEBERTA,
        "An|Mn",
        _each("encoder.layer.{}", 2),
        note="terms of the scores are added in place inside attention; own softmax, no interface",
    ),
    "deberta_v2_conv": Family(
        "DebertaV2Model",
        _DEBERTA | {"conv_kernel_size": 3},
        "An|Mn",
        _each("encoder.layer.{}", 2),
        note="a conv of the embeddings is added to the stream between blocks 1 and 2, outside every block",
    ),
    "mpnet": Family("MPNetModel", BERT, "An|Mn", _each("encoder.layer.{}"), note="blocks return a tuple"),
    # Encoders of text, norm first
    "modernbert": Family(
        "ModernBertModel",
        BERT
        | {"local_attention": 8, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
        | {"bos_token_id": 1, "eos_token_id": 2},
        "A|M",
        _each("layers.{}"),
        note="the first block has no attention norm; blocks 2 and 3 attend within a window",
    ),
    "t5_encoder": Family(
        "T5EncoderModel",
        _T5,
        "A|M",
        _each("encoder.block.{}"),
        note="both adds are inside the sublayers; a block returns (stream, position bias, None)",
    ),
    # Decoders
    "gpt2": Family("GPT2Model", GPT2, "A|M", _each("h.{}")),
    "opt": Family(
        "OPTModel", _OPT, "A|M", _each("decoder.layers.{}"), note="the MLP junction adds (B*T, D) tensors"
    ),
    "opt_post_norm": Family(
        "OPTModel",
        _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
        "An|Mn",
        _each("decoder.layers.{}"),
        note="as OPT-350m: norms after the junctions, the MLP junction flat; project_in and project_out "
        "around the blocks",
    ),
    "gpt_neox": Family(
        "GPTNeoXModel", BERT, "A+M", _each("layers.{}"), note="parallel: (mlp + attention) + stream"
    ),
    "gpt_neox_sequential": Family(
        "GPTNeoXModel", BERT | {"use_parallel_residual": False}, "A|M", _each("layers.{}")
    ),
    "gptj": Family(
        "GPTJModel",
        GPT2 | {"rotary_dim": 4},
        "A+M",
        _each("h.{}"),
        note="parallel: (attention + mlp) + stream; blocks return a tuple",
    ),
    "bloom": Family(
        "BloomModel",
        _BLOOM,
        "A|M",
        _each("h.{}"),
        note="the stream is passed into attention and mlp, which add it themselves; the activation is an "
        "autograd.Function",
    ),
    "bloom_post_norm": Family(
        "BloomModel",
        _BLOOM | {"apply_residual_connection_post_layernorm": True},
        "An|M",
        _each("h.{}"),
        note="each skip carries the normed stream: a norm stands on the spine before the junction",
    ),
    "falcon": Family(
        "FalconModel",
        _FALCON,
        "A+M",
        _each("h.{}"),
        note="mlp += attention in place, then stream + mlp; the linear adds its bias by a separate +",
    ),
    "falcon_new": Family(
        "FalconModel",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        "A+M",
        _each("h.{}"),
        note="as falcon, a norm for each branch; FalconLinear: matmul + bias is an add of width D",
    ),
    "llama": Family("LlamaModel", LLAMA, "A|M", _each("layers.{}")),
    "mistral": Family(
        "MistralModel", LLAMA | {"sliding_window": 6}, "A|M", _each("layers.{}"), note="window of 6 tokens"
    ),
    "qwen3": Family(
        "Qwen3Model",
        LLAMA | {"head_dim": 8},
        "A|M",
        _each("layers.{}"),
        note="norms of queries and keys inside attention",
    ),
    "gemma2": Family(
        "Gemma2Model",
        LLAMA | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
        "A|M",
        _each("layers.{}"),
        # in float64 the mask's least number is -inf to the softmax's float32: a pad with only pads in its
        # window is NaN, and then, by 0 * NaN, every token
        dtypes=(torch.float32, torch.bfloat16),
        note="sandwich norms: one before and one at the end of each branch, none after the junction; "
        "the gain is 1 + weight; eager attention (softcap)",
    ),
    "phi": Family(
        "PhiModel", LLAMA, "A+M", _each("layers.{}"), note="parallel: (attention + mlp) + stream, one norm"
    ),
    "mixtral": Family(
        "MixtralModel",
        LLAMA | {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        "A|M",
        _each("layers.{}", 2),
        note="routed experts: index_add_ within the mlp branch; no float64 by default",
    ),
    "olmo2": Family(
        "Olmo2Model",
        LLAMA | {"eos_token_id": 2},
        "A|M",
        _each("layers.{}"),
        note="norms at the end of the branches only, none before and none after the junction",
    ),
    # Images
    "vit": Family("ViTModel", VIT, "A|M", _each("layers.{}"), "image"),
    "deit": Family("DeiTModel", VIT, "A|M", _each("layers.{}"), "image", note="two extra tokens"),
    "dinov2": Family(
        "Dinov2Model",
        VIT | {"mlp_ratio": 2},
        "A|M",
        _each("encoder.layer.{}"),
        "image",
        note="LayerScale as a module at the end of each branch",
    ),
    "beit": Family(
        "BeitModel",
        VIT | {"use_relative_position_bias": True},
        "A|M",
        _each("layers.{}"),
        "image",
        note="LayerScale as a bare parameter; a position bias for each block",
    ),
    "clip_vision": Family(
        "CLIPVisionModel",
        VIT,
        "A|M",
        _each("encoder.layers.{}"),
        "image",
        note="a norm before block 1; last_hidden_state is the bare stream",
    ),
    "swin": Family(
        "SwinModel",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        "A|M",
        tuple(f"encoder.layers.{stage}.blocks.{block}" for stage in (0, 1) for block in (0, 1)),
        "image",
        note="stages of different width and length: (B, 64, 16), then (B, 16, 32); the attention branch "
        "works on windows (4B, 16, 16)",
    ),
    # With heads
    "bert_mlm": Family("BertForMaskedLM", BERT, "An|Mn", _each("bert.encoder.layer.{}"), extra=_segments),
    "bert_classifier": Family(
        "BertForSequenceClassification",
        BERT | {"num_labels": 5},
        "An|Mn",
        _each("bert.encoder.layer.{}"),
        extra=_segments,
    ),
    "gpt2_lm": Family("GPT2LMHeadModel", GPT2, "A|M", _each("transformer.h.{}")),
    "vit_classifier": Family(
        "ViTForImageClassification", VIT | {"num_labels": 5}, "A|M", _each("vit.layers.{}"), "image"
    ),
    # Not a transformer
    "resnet": Family(
        "ResNetModel",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"},
        None,
        modality="image",
        note="skips without attention: must be refused",
    ),
}
TRANSFORMERS = [name for name, family in ZOO.items() if family.signature is not None]


def build(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    length: int = 12,
    padded: bool = False,
    seed: int = 0,
) -> tuple[Any, Inputs]:
    """The model `name` of the zoo in eval mode, and a batch for it.

    batch, length: of the inputs; images have a fixed number of tokens.
    padded: texts get shorter from sample to sample and are padded (at the left for XLNet); images stay.
    Returns the model and its keyword inputs: input_ids and attention_mask (B, T), or pixel_values.
    """
    family = ZOO[name]
    cls = getattr(transformers, family.cls)
    model = make(cls, cls.config_class(**family.config), dtype, seed)
    randomise(model, dtype, seed)
    return model, inputs_for(name, model, dtype=dtype, batch=batch, length=length, padded=padded, seed=seed)


def inputs_for(
    name: str,
    model: Any,
    *,
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    length: int = 12,
    padded: bool = False,
    seed: int = 0,
) -> Inputs:
    """A batch for a model of `build`; see there."""
    family = ZOO[name]
    generator = torch.Generator().manual_seed(seed + 1)
    if family.modality == "image":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator).to(dtype)}
    ids = torch.randint(FIRST_ID, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, batch):  # the first text is full
            count = min(row * length // 3, length - 2)
            pads = slice(None, count) if family.padding_side == "left" else slice(length - count, None)
            mask[row, pads] = 0
        ids[mask == 0] = getattr(model.config, "pad_token_id", None) or 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family.extra is not None:
        inputs |= {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in family.extra(inputs).items()
        }
    return inputs
