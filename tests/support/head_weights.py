"""The query, key, value and output maps of heads, taken out of five families by hand, each as the library lays it out."""

from typing import Any

import torch
from torch import Tensor

HEADS, WIDTH, DIM = 4, 8, 32  # of the zoo
Maps = dict[str, Tensor]  # query, key, value (heads, width, dim + 1), the bias last; out (heads, dim, width)


@torch.no_grad()
def by_hand(name: str, model: Any, block: int) -> Maps:
    """float64, the gain of a norm before the projections folded in, keys and values repeated for their groups."""
    weight, bias, out, gain, shift = _PARTS[name](model, block)
    maps = {}
    for part, rows in weight.items():
        w = rows.double() * gain.double()
        b = bias[part].double() + rows.double() @ shift.double()
        one = torch.cat([w, b[:, None]], 1).unflatten(0, (-1, WIDTH))
        maps[part] = one.repeat_interleave(HEADS // len(one), 0)
    maps["out"] = out.double().unflatten(1, (HEADS, WIDTH)).transpose(0, 1)
    return maps


def dense(maps: Maps) -> tuple[Tensor, Tensor]:
    """The whole forms: query-key (heads, dim + 1, dim + 1) and output-value (heads, dim, dim + 1)."""
    return maps["query"].mT @ maps["key"], maps["out"] @ maps["value"]


def _separate(attention: Any, names: tuple[str, str, str], out: Any, norm: Any) -> Any:
    modules = {
        part: attention.get_submodule(name)
        for part, name in zip(("query", "key", "value"), names, strict=True)
    }
    weight = {part: module.weight for part, module in modules.items()}
    bias = {part: torch.zeros(len(m.weight)) if m.bias is None else m.bias for part, m in modules.items()}
    return weight, bias, out.weight, *_gain(norm)


def _gain(norm: Any) -> tuple[Tensor, Tensor]:
    if norm is None:
        return torch.ones(DIM), torch.zeros(DIM)
    shift = getattr(norm, "bias", None)
    return norm.weight, torch.zeros(DIM) if shift is None else shift


def _bert(model: Any, block: int) -> Any:
    layer = model.encoder.layer[block].attention
    return _separate(layer.self, ("query", "key", "value"), layer.output.dense, None)


def _llama(model: Any, block: int) -> Any:
    layer = model.layers[block]
    return _separate(
        layer.self_attn, ("q_proj", "k_proj", "v_proj"), layer.self_attn.o_proj, layer.input_layernorm
    )


def _vit(model: Any, block: int) -> Any:
    layer = model.layers[block]
    return _separate(
        layer.attention, ("q_proj", "k_proj", "v_proj"), layer.attention.o_proj, layer.layernorm_before
    )


def _gpt2(model: Any, block: int) -> Any:
    """Conv1D: (in, out), queries, keys and values one after the other."""
    layer = model.h[block]
    parts = zip(
        ("query", "key", "value"),
        layer.attn.c_attn.weight.T.split(DIM),
        layer.attn.c_attn.bias.split(DIM),
        strict=True,
    )
    parts = list(parts)
    weight, bias = {part: w for part, w, _ in parts}, {part: b for part, _, b in parts}
    return weight, bias, layer.attn.c_proj.weight.T, *_gain(layer.ln_1)


def _gpt_neox(model: Any, block: int) -> Any:
    """Of each head its queries, keys and values one after the other."""
    layer = model.layers[block]
    fused = layer.attention.query_key_value
    rows = fused.weight.unflatten(0, (HEADS, 3, WIDTH)), fused.bias.unflatten(0, (HEADS, 3, WIDTH))
    weight = {part: rows[0][:, n].flatten(0, 1) for n, part in enumerate(("query", "key", "value"))}
    bias = {part: rows[1][:, n].flatten() for n, part in enumerate(("query", "key", "value"))}
    return weight, bias, layer.attention.dense.weight, *_gain(layer.input_layernorm)


_PARTS = {"bert": _bert, "gpt2": _gpt2, "llama": _llama, "gpt_neox": _gpt_neox, "vit": _vit}
