"""Gates on random small models of eight families, against the same weights scaled or set to zero by hand."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from support.random_models import randomise
from torch import nn

import rc_probe

TOLERANCE = 1e-9  # of float64, relative to the largest number


@dataclass(frozen=True)
class Family:
    """cls, config: of transformers; names: what its config calls width, depth, heads, inner width.

    block: path of a block; attention, mlp: in it, the map that writes to the stream
    """

    cls: str
    config: str
    names: tuple[str, str, str, str]
    block: str
    attention: str
    mlp: str
    fixed: dict[str, Any]
    stack: str | None = None


USUAL = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
TEXT = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = (
    Family("BertModel", "BertConfig", USUAL, "encoder.layer.{}", "attention.output.dense", "output.dense", TEXT),
    Family("GPT2Model", "GPT2Config", ("n_embd", "n_layer", "n_head", "n_inner"), "h.{}", "attn.c_proj", "mlp.c_proj",
           {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}),
    Family("LlamaModel", "LlamaConfig", USUAL, "layers.{}", "self_attn.o_proj", "mlp.down_proj", TEXT),
    Family("OPTModel", "OPTConfig", ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim"),
           "decoder.layers.{}", "self_attn.out_proj", "fc2", TEXT),
    Family("T5EncoderModel", "T5Config", ("d_model", "num_layers", "num_heads", "d_ff"), "encoder.block.{}",
           "layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo", {"vocab_size": 50}),
    Family("GPTNeoXModel", "GPTNeoXConfig", USUAL, "layers.{}", "attention.dense", "mlp.dense_4h_to_h", TEXT),
    Family("BartModel", "BartConfig", ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim"),
           "encoder.layers.{}", "self_attn.out_proj", "fc2",
           TEXT | {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}, "encoder"),
    Family("ViTModel", "ViTConfig", USUAL, "layers.{}", "attention.o_proj", "mlp.fc2",
           {"image_size": 8, "patch_size": 4}),
)  # fmt: skip


@dataclass
class Drawn:
    """A model, inputs, and a gate on it."""

    family: Family
    model: Any
    inputs: dict[str, Any]
    depth: int
    heads: int


def draw(number: int) -> tuple[Drawn, random.Random]:
    """The model of that number; families take turns."""
    dice, family = random.Random(number), FAMILIES[number % len(FAMILIES)]
    heads, depth = dice.choice([1, 2, 3, 4]), dice.choice([1, 2, 3, 4])
    width = heads * dice.choice([4, 8, 12])
    sizes = dict(zip(family.names, (width, depth, heads, dice.choice([16, 24, 40])), strict=True))
    if family.cls == "T5EncoderModel":
        sizes |= {"d_kv": width // heads, "feed_forward_proj": dice.choice(["relu", "gated-gelu"])}
    if family.cls == "LlamaModel":
        sizes["num_key_value_heads"] = dice.choice([n for n in range(1, heads + 1) if heads % n == 0])
    if family.cls == "GPTNeoXModel":
        sizes["use_parallel_residual"] = dice.random() < 0.5
    if family.cls == "OPTModel":
        sizes |= {"do_layer_norm_before": dice.random() < 0.5, "word_embed_proj_dim": width}
    config = getattr(transformers, family.config)(**(family.fixed | sizes))
    config._attn_implementation = dice.choice(["eager", "sdpa"])
    model = getattr(transformers, family.cls)(config).eval()
    randomise(model, torch.float64, seed=number)
    return Drawn(family, model.double(), _inputs(family, dice, number), depth, heads), dice


def _inputs(family: Family, dice: random.Random, number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    rows = dice.choice([2, 3])
    if family.cls == "ViTModel":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator).double()}
    tokens = dice.choice([5, 8, 11])
    lengths = torch.tensor([tokens] + [dice.randint(2, tokens) for _ in range(rows - 1)])
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    ids = torch.randint(5, 50, (rows, tokens), generator=generator) * mask
    more = {"decoder_input_ids": ids[:, :3]} if family.cls == "BartModel" else {}
    return {"input_ids": ids, "attention_mask": mask} | more


def by_hand(drawn: Drawn, part: str, block: int, value: float, head: int) -> Any:
    """A copy whose map of that part has its numbers times `value`; of a head, those that read it."""
    model = copy.deepcopy(drawn.model)
    path = drawn.family.block.format(block - 1)
    to = model.get_submodule(f"{path}.{drawn.family.mlp if part == 'mlp' else drawn.family.attention}")
    with torch.no_grad():
        if part == "head":
            reads = to.weight.T if isinstance(to, nn.Linear) else to.weight  # (heads · size, width)
            reads.unflatten(0, (drawn.heads, -1))[head - 1].mul_(value)
        else:
            for parameter in to.parameters():
                parameter.mul_(value)
    return model


def check(number: int) -> str:
    """What is wrong with a random gate on the model of that number; "" where nothing is."""
    drawn, dice = draw(number)
    part, block = dice.choice(["attention", "mlp", "head"]), dice.randint(1, drawn.depth)
    value, head = dice.choice([0.0, 0.0, 0.5, -1.0, 2.0]), dice.randint(1, drawn.heads)
    spec = f"{part}@{block}{f':{head}' if part == 'head' else ''}={value}"
    where = f"{drawn.family.cls} {number}, {spec}"
    try:
        with torch.no_grad():
            with rc_probe.ablate(drawn.model, spec, inputs=drawn.inputs, stack=drawn.family.stack):
                found = drawn.model(**drawn.inputs)[0]
            wanted = by_hand(drawn, part, block, value, head)(**drawn.inputs)[0]
    except Exception as error:  # a crash is what is looked for
        return f"{where}: {type(error).__name__}: {error}"
    if drawn.family.stack:  # the decoder's output tells it, too: it reads the encoder's
        assert found.shape == wanted.shape
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return "" if error < TOLERANCE else f"{where}: off by {error:.1e}"
