"""Rules of path arithmetic for what is held: norm scales, activation gates, attention patterns, choices."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rc_probe.hooks.operator_rules import Rules, attention_pattern, attention_scores

from .parts import HELD, Parts, plain
from .rules_maps import mapped, scaled, weigh

# What is held: patterns, scales, gates, choices, questions.
rule = Rules(Parts)
FREEZING = set(
    """softmax log_softmax softmin sigmoid hardsigmoid logsigmoid exp expm1 exp2 log log1p log2 log10 sqrt
    rsqrt reciprocal rdiv rtruediv var std var_mean std_mean norm linalg_norm vector_norm
    linalg_vector_norm cos sin softplus argsort argmax argmin amin amax logsumexp logaddexp cdist sign
    floor ceil round trunc frac isnan isinf isfinite any all eq ne lt le gt ge equal allclose isclose
    bool int long item bincount one_hot nonzero unique multinomial count_nonzero
    searchsorted bucketize format new_zeros new_ones new_full new_empty new_tensor empty_like ones_like
    full_like rand_like randn_like randint_like aminmax float_power atan2 cosine_similarity logical_not
    is_same_size storage_offset""".split()  # noqa: SIM905
)


@rule("sigmoid hardsigmoid")
def _held(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    out = func(plain(x), *args, **kwargs)
    if isinstance(x, Parts):
        setattr(out, HELD, x.root)
    return out


# ---- activations


@rule(
    "gelu silu swish relu relu6 tanh leaky_relu elu selu celu mish hardswish hardtanh softsign tanhshrink erf "
    "hardshrink softshrink prelu rrelu threshold clamp clip clamp_min clamp_max abs absolute arctan atan sinh asinh square "
    "logit relu_"
)
def _activation(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """act(x) = x · act(x)/x; what does not keep zero at zero is held whole."""
    args, kwargs = plain(args), plain(kwargs)
    if not isinstance(input, Parts):
        return NotImplemented
    x, least = input.value, 1e-30
    value = func(x, *args, **kwargs)
    first = x[:1] if x.ndim else x  # of all entries of a channel the same
    if bool((func(torch.zeros_like(first), *args, **kwargs) != 0).any()):
        return value

    def parts() -> Tensor:
        slope = func(torch.full_like(first, least), *args, **kwargs) / least  # the derivative at zero
        ratio = torch.where(x.abs() < least, slope, value / x)
        p, out = input.taken()
        return torch.mul(p, ratio, out=out)

    return Parts(value, parts, input.ledger, gate=True, bilinear=input.bilinear, root=input.root, fresh=True)


@rule("pow ipow")
def _pow(func: Any, x: Any, p: Any) -> Any:
    if not isinstance(x, Parts) or isinstance(p, Tensor) or p <= 0:
        return func(plain(x), plain(p))
    return _activation(func, x, p)


# ---- norms


@rule("layer_norm")
def _layer_norm(
    func: Any, input: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any
) -> Any:
    value = func(input.value, shape, weight, bias, eps)
    axes = list(range(-len(shape), 0))

    def run(p: Tensor, out: Tensor | None) -> Tensor:
        scale = (input.value.var(axes, correction=0, keepdim=True) + eps).rsqrt()
        centred = torch.sub(p, p.mean(axes, keepdim=True), out=out)
        return centred.mul_(scale if weight is None else scale * weight)

    return scaled(value, input, run, bias)


@rule("rms_norm")
def _rms_norm(func: Any, input: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    value = func(input.value, shape, weight, eps)
    axes = list(range(-len(shape), 0))
    least = torch.finfo(input.dtype).eps if eps is None else eps

    def run(p: Tensor, out: Tensor | None) -> Tensor:
        scale: Tensor = (input.value.square().mean(axes, keepdim=True) + least).rsqrt()
        return torch.mul(p, scale if weight is None else scale * weight, out=out)

    return scaled(value, input, run)


@rule("group_norm")
def _group_norm(
    func: Any, input: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any
) -> Any:
    value = func(input.value, groups, weight, bias, eps)
    shape = (-1, *[1] * (input.ndim - 2))

    def run(p: Tensor) -> Tensor:
        whole = input.value.unflatten(1, (groups, -1)).flatten(2)
        scale = (whole.var(-1, correction=0, keepdim=True) + eps).rsqrt()
        each = p.unflatten(2, (groups, -1)).flatten(3)
        out: Tensor = ((each - each.mean(-1, keepdim=True)) * scale).reshape(p.shape)
        return out if weight is None else out * weight.reshape(shape)

    return mapped(value, input, run, None if bias is None else bias.reshape(shape))


@rule("batch_norm")
def _batch_norm(
    func: Any, input: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5, *rest: Any,
) -> Any:  # fmt: skip
    if training:
        return NotImplemented
    value = func(input.value, mean, var, weight, bias, training, momentum, eps)
    shape = (-1, *[1] * (input.ndim - 2))
    scale = (var + eps).rsqrt() * (1 if weight is None else weight)
    constant = -mean * scale + (0 if bias is None else bias)
    return mapped(value, input, lambda p: p * scale.reshape(shape), constant.reshape(shape))


@rule("normalize")
def _normalize(
    func: Any, input: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None
) -> Any:
    value = func(input.value, p, dim, eps)

    def run(parts: Tensor) -> Tensor:
        size: Tensor = input.value.norm(p, dim, keepdim=True).clamp_min(eps)
        return parts / size

    return mapped(value, input, run)


# ---- attention


@rule("scaled_dot_product_attention")
def _sdpa(
    func: Any, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    if dropout_p:
        return NotImplemented
    q, k, v, mask = plain((query, key, value, attn_mask))
    out = func(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    if not isinstance(value, Parts):
        return out

    def run(p: Tensor) -> Tensor:
        if enable_gqa:
            p = p.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
        return weigh(p, pattern(q, k, mask, is_causal, scale))

    return mapped(out, value, run, fresh=True)


@rule("multi_head_attention_forward")
def _multi_head(func: Any, *args: Any, **kwargs: Any) -> Any:
    """torch's own attention layer, tokens first: (tokens, batch, dim)."""
    given = inspect.signature(func).bind(*args, **kwargs)
    given.apply_defaults()
    a = given.arguments
    unusual = ("bias_k", "bias_v", "static_k", "static_v", "add_zero_attn")
    value = a["value"]
    if any(a[name] is not None and a[name] is not False for name in unusual) or value.ndim != 3:
        return NotImplemented
    out, weights = func(**plain(a))
    if not isinstance(value, Parts):
        return out, weights
    patterns = func(**plain({**a, "need_weights": True, "average_attn_weights": False}))[1]
    dim, heads = value.shape[-1], a["num_heads"]
    weight = a["v_proj_weight"] if a["use_separate_proj_weight"] else a["in_proj_weight"][-dim:]
    bias = None if a["in_proj_bias"] is None else a["in_proj_bias"][-dim:]
    values = functional.linear(value, weight, bias).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
    mixed = torch.matmul(patterns, values).permute(2, 0, 1, 3).flatten(-2)
    made: Any = functional.linear(mixed, a["out_proj_weight"], a["out_proj_bias"])
    made.value = out  # to the last bit
    return made, weights


def pattern(query: Tensor, key: Tensor, mask: Any, is_causal: bool, scale: float | None) -> Tensor:
    """The pattern (…, T, S) of scaled_dot_product_attention; a query that may attend to nothing has zeros."""
    key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3) if query.ndim > 3 else key
    scores = attention_scores(query, key, mask, is_causal, scale)
    return scores.softmax(-1) if mask is None and not is_causal else attention_pattern(scores)


# ---- choices


@rule("topk sort max min kthvalue")
def _choice(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Which are the largest is held; their values are those of the stream."""
    out = func(plain(input), *plain(args), **plain(kwargs))
    if not isinstance(input, Parts) or not isinstance(out, tuple):
        return out
    given = args if func.__name__ in {"sort", "max", "min"} else args[1:]  # the others: how many, or which
    dim = kwargs.get("dim", given[0] if given else -1)
    places = out[1]
    if not isinstance(dim, int) or places.ndim != input.ndim:
        return NotImplemented
    values = mapped(out[0], input, torch.vmap(lambda q: q.gather(dim, places)))
    return type(out)((values, places))
