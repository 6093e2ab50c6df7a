"""Forward passes of BERT, GPT-2, Llama and ViT written by hand: state dict in, streams out.

Plain torch operations only: no module of a library, no hook, nothing of rc_probe. The operations, their
arguments and their order are those of transformers 5.23, so that results can be compared bitwise.

    streams(model_type, state_dict, config, inputs, variant, edits) -> [stream 0, ..., stream L]

Shapes: B samples, T tokens, D width, H heads of width d.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

State = Mapping[str, Tensor]
Gate = float | Tensor  # one number, or (B,) for one number per sample
Edits = Mapping[int, Mapping[str, Any]]

# variant -> (attention skip on, MLP sublayer on); Dong et al. 2021, section 4.1
VARIANTS = {
    "SAN": (False, False),
    "SAN+MLP": (False, True),
    "SAN+skip": (True, False),
    "transformer": (True, True),
}
EDITS = {"attention", "attention.skip", "mlp", "mlp.skip", "mlp.sublayer", "heads"}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: (
        0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
    ),
    "relu": F.relu,
    "silu": F.silu,
}


@torch.no_grad()
def streams(
    model_type: str,
    state_dict: State,
    config: Any,
    inputs: Mapping[str, Tensor],
    *,
    variant: str = "transformer",
    edits: Edits | None = None,
) -> list[Tensor]:
    """All streams of one forward pass, L + 1 tensors (B, T, D), before any final norm.

    model_type: "bert", "gpt2", "llama" or "vit"; heads on top of the model are ignored.
    config: any object with the attributes of the model's config.
    inputs: input_ids, and optionally attention_mask and (BERT) token_type_ids; or pixel_values.
    variant: "SAN", "SAN+MLP", "SAN+skip" or "transformer". Without the attention skip the junction's sum is
        the branch alone, and a norm after it stays. Without the MLP the whole sublayer vanishes, with its own
        skip and, where the norm comes after it, its norm; with the MLP its own skip is there.
    edits: {block: {name: gate}} on top of the variant, blocks counted from 1 (block l makes stream l):
        "attention", "attention.skip", "mlp", "mlp.skip" scale one operand of a junction (its norm stays),
        "mlp.sublayer": 0 removes the sublayer, "heads": (H,) numbers scale the heads before their projection.
    """
    model = MODELS[model_type](state_dict, config)
    skip, mlp = VARIANTS[variant]
    edits = dict(edits or {})
    x, mask = model.embed(inputs)
    out = [x]
    for block in range(1, config.num_hidden_layers + 1):
        gates = {"attention.skip": float(skip), "mlp.sublayer": float(mlp), **edits.pop(block, {})}
        if not gates.keys() <= EDITS:
            raise KeyError(f"unknown edit in {sorted(gates)}")
        x = model.block(block - 1, x, mask, gates)
        out.append(x)
    if edits:
        raise KeyError(f"no such block: {sorted(edits)}")
    return out


@torch.no_grad()
def last_hidden_state(model_type: str, state_dict: State, config: Any, stream: Tensor) -> Tensor:
    """The model's output for the last stream: behind the final norm where the family has one."""
    return MODELS[model_type](state_dict, config).final(stream)


def junction(branch: Tensor, skip: Tensor, gates: Mapping[str, Any], name: str) -> Tensor:
    """gate * branch + gate * skip; an operand with gate 1 is untouched, one with gate 0 is not there."""
    kept = [
        operand if _is(gate, 1) else operand * _per_sample(gate)
        for operand, gate in ((branch, gates.get(name, 1)), (skip, gates.get(f"{name}.skip", 1)))
        if not _is(gate, 0)
    ]
    return sum(kept[1:], kept[0]) if kept else torch.zeros_like(branch)


def _is(gate: Gate, number: float) -> bool:
    return not isinstance(gate, Tensor) and gate == number


def _per_sample(gate: Gate) -> Gate:
    return gate[:, None, None] if isinstance(gate, Tensor) else gate  # (B,) -> (B, 1, 1)


class Model:
    """What the four families share; a family says how it embeds and what its two branches are."""

    anchor: str  # a parameter that every checkpoint has, to find the prefix a head puts before the names
    causal = False

    def __init__(self, state_dict: State, config: Any) -> None:
        prefixes = [name.removesuffix(self.anchor) for name in state_dict if name.endswith(self.anchor)]
        (self.prefix,) = prefixes
        self.state = state_dict
        self.config = config

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Stream 0 (B, T, D), and the mask of the attention (B, 1, T, T), True where a token is seen."""
        raise NotImplementedError

    def block(self, index: int, x: Tensor, mask: Tensor | None, gates: Mapping[str, Any]) -> Tensor:
        """The stream after block `index`, counted from 0."""
        raise NotImplementedError

    def final(self, x: Tensor) -> Tensor:
        return x

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def get(self, name: str) -> Tensor | None:
        return self.state.get(self.prefix + name)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self[f"{name}.weight"], self.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        eps = getattr(self.config, "layer_norm_eps", None) or self.config.layer_norm_epsilon
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"], eps)

    def token_mask(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """None where no token is hidden but by causality, which the attention op knows by itself."""
        padding = inputs.get("attention_mask")
        if padding is None or bool(padding.bool().all()):
            return None
        B, T = padding.shape
        seen = padding.bool()[:, None, None, :].expand(B, 1, T, T)
        if self.causal:
            seen = seen & torch.ones(T, T, dtype=torch.bool, device=padding.device).tril()
        return seen

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gates: Mapping[str, Any]
    ) -> Tensor:
        """softmax(q k^T / sqrt(d)) v; q (B, H, T, d), k and v (B, H or fewer, T, d) -> (B, T, H * d)."""
        B, H, T, d = q.shape
        groups = H // k.shape[1]
        if groups > 1 and mask is not None:  # as the library: repeated under a mask, left to the op without
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            scale=d**-0.5,
            is_causal=self.causal and mask is None and T > 1,
            enable_gqa=groups > 1 and mask is None,
        )
        out = out.transpose(1, 2).contiguous()  # (B, T, H, d)
        if "heads" in gates:
            out = out * torch.as_tensor(gates["heads"], dtype=out.dtype, device=out.device)[:, None]
        return out.reshape(B, T, H * d)

    def heads(self, x: Tensor, d: int) -> Tensor:
        """(B, T, H * d) -> (B, H, T, d)"""
        return x.view(*x.shape[:-1], -1, d).transpose(1, 2)


class Bert(Model):
    anchor = "embeddings.word_embeddings.weight"

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        ids = inputs["input_ids"]
        kinds = inputs.get("token_type_ids", torch.zeros_like(ids))
        x = F.embedding(ids, self["embeddings.word_embeddings.weight"])
        x = x + F.embedding(kinds, self["embeddings.token_type_embeddings.weight"])
        x = x + self["embeddings.position_embeddings.weight"][: ids.shape[1]]
        return self.norm("embeddings.LayerNorm", x), self.token_mask(inputs)

    def block(self, index: int, x: Tensor, mask: Tensor | None, gates: Mapping[str, Any]) -> Tensor:
        at = f"encoder.layer.{index}"
        d = self.config.hidden_size // self.config.num_attention_heads
        qkv = (self.linear(f"{at}.attention.self.{n}", x) for n in ("query", "key", "value"))
        q, k, v = (self.heads(part, d) for part in qkv)
        o = self.linear(f"{at}.attention.output.dense", self.attend(q, k, v, mask, gates))
        a = self.norm(f"{at}.attention.output.LayerNorm", junction(o, x, gates, "attention"))
        if not gates["mlp.sublayer"]:
            return a
        m = ACTIVATIONS[self.config.hidden_act](self.linear(f"{at}.intermediate.dense", a))
        m = self.linear(f"{at}.output.dense", m)
        return self.norm(f"{at}.output.LayerNorm", junction(m, a, gates, "mlp"))


class PreNorm(Model):
    """x' = a + mlp(norm(a)), a = x + attention(norm(x)): the families that norm at the start of a branch."""

    def attention(self, index: int, x: Tensor, mask: Tensor | None, gates: Mapping[str, Any]) -> Tensor:
        """The attention branch of the stream x, its norm included."""
        raise NotImplementedError

    def mlp(self, index: int, x: Tensor) -> Tensor:
        """The MLP branch of the stream x, its norm included."""
        raise NotImplementedError

    def block(self, index: int, x: Tensor, mask: Tensor | None, gates: Mapping[str, Any]) -> Tensor:
        a = junction(self.attention(index, x, mask, gates), x, gates, "attention")
        return junction(self.mlp(index, a), a, gates, "mlp") if gates["mlp.sublayer"] else a


class Gpt2(PreNorm):
    anchor = "wte.weight"
    causal = True

    def linear(self, name: str, x: Tensor) -> Tensor:
        """The library's Conv1D: the weight is (in, out)."""
        flat = torch.addmm(self[f"{name}.bias"], x.view(-1, x.shape[-1]), self[f"{name}.weight"])
        return flat.view(*x.shape[:-1], -1)

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        ids = inputs["input_ids"]
        x = F.embedding(ids, self["wte.weight"]) + self["wpe.weight"][: ids.shape[1]]
        return x, self.token_mask(inputs)

    def attention(self, index: int, x: Tensor, mask: Tensor | None, gates: Mapping[str, Any]) -> Tensor:
        d = x.shape[-1] // self.config.num_attention_heads
        qkv = self.linear(f"h.{index}.attn.c_attn", self.norm(f"h.{index}.ln_1", x))
        q, k, v = (self.heads(part, d) for part in qkv.chunk(3, dim=-1))
        return self.linear(f"h.{index}.attn.c_proj", self.attend(q, k, v, mask, gates))

    def mlp(self, index: int, x: Tensor) -> Tensor:
        inner = self.linear(f"h.{index}.mlp.c_fc", self.norm(f"h.{index}.ln_2", x))
        return self.linear(f"h.{index}.mlp.c_proj", ACTIVATIONS[self.config.activation_function](inner))

    def final(self, x: Tensor) -> Tensor:
        return self.norm("ln_f", x)


class Llama(PreNorm):
    anchor = "embed_tokens.weight"
    causal = True

    def norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm, in float32 for every dtype."""
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return self[f"{name}.weight"] * y.to(x.dtype)

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return F.embedding(inputs["input_ids"], self["embed_tokens.weight"]), self.token_mask(inputs)

    def attention(self, index: int, x: Tensor, mask: Tensor | None, gates: Mapping[str, Any]) -> Tensor:
        at, y = f"layers.{index}", self.norm(f"layers.{index}.input_layernorm", x)
        d = getattr(self.config, "head_dim", None) or x.shape[-1] // self.config.num_attention_heads
        q, k, v = (self.heads(self.linear(f"{at}.self_attn.{n}_proj", y), d) for n in "qkv")
        cos, sin = self.rotations(x, d)
        q, k = q * cos + self.half_turn(q) * sin, k * cos + self.half_turn(k) * sin
        return self.linear(f"{at}.self_attn.o_proj", self.attend(q, k, v, mask, gates))

    def mlp(self, index: int, x: Tensor) -> Tensor:
        at, y = f"layers.{index}.mlp", self.norm(f"layers.{index}.post_attention_layernorm", x)
        gate = ACTIVATIONS[self.config.hidden_act](self.linear(f"{at}.gate_proj", y))
        return self.linear(f"{at}.down_proj", gate * self.linear(f"{at}.up_proj", y))

    def final(self, x: Tensor) -> Tensor:
        return self.norm("norm", x)

    def rotations(self, x: Tensor, d: int) -> tuple[Tensor, Tensor]:
        """cos and sin of position times frequency, (T, d)."""
        base = self.config.rope_parameters["rope_theta"]
        frequency = 1.0 / (base ** (torch.arange(0, d, 2, dtype=torch.float, device=x.device) / d))
        angle = torch.arange(x.shape[1], device=x.device)[:, None].float() * frequency
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    @staticmethod
    def half_turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)


class Vit(PreNorm):
    anchor = "embeddings.cls_token"

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        pixels, at = inputs["pixel_values"], "embeddings.patch_embeddings.projection"
        x = F.conv2d(pixels, self[f"{at}.weight"], self[f"{at}.bias"], stride=self.config.patch_size)
        x = x.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, h * w, D)
        x = torch.cat((self["embeddings.cls_token"].expand(len(x), -1, -1), x), dim=1)
        return x + self["embeddings.position_embeddings"], None

    def attention(self, index: int, x: Tensor, mask: Tensor | None, gates: Mapping[str, Any]) -> Tensor:
        at, y = f"layers.{index}.attention", self.norm(f"layers.{index}.layernorm_before", x)
        d = x.shape[-1] // self.config.num_attention_heads
        q, k, v = (self.heads(self.linear(f"{at}.{n}_proj", y), d) for n in "qkv")
        return self.linear(f"{at}.o_proj", self.attend(q, k, v, mask, gates))

    def mlp(self, index: int, x: Tensor) -> Tensor:
        at, y = f"layers.{index}.mlp", self.norm(f"layers.{index}.layernorm_after", x)
        return self.linear(f"{at}.fc2", ACTIVATIONS[self.config.hidden_act](self.linear(f"{at}.fc1", y)))

    def final(self, x: Tensor) -> Tensor:
        return self.norm("layernorm", x)


MODELS: dict[str, type[Model]] = {"bert": Bert, "gpt2": Gpt2, "llama": Llama, "vit": Vit}
