"""Path arithmetic, operation by operation: parts add up to the value, and are what other arithmetic gives for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.frozen import rules_held as parts_frozen  # noqa: F401 - they register the rules
from rc_probe.hooks.frozen.parts import Ledger, Parts, Unknown

CHANNELS = 3
Rule = Callable[..., Any]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ledger() -> Ledger:
    """One channel for constants, then one for each length."""
    return Ledger(fixed=1, group=1, constant=0)


def stream(*shape: int, seed: int = 0, channels: int = CHANNELS) -> Parts:
    parts = noise(channels, *shape, seed=seed + 100)
    return Parts(parts.sum(0), parts, ledger())


def check(x: Any, value: Tensor, parts: Tensor) -> None:
    """`x` is this value, these are its parts, and they add up."""
    assert isinstance(x, Parts), x
    assert x.shape == x.value.shape == x.parts.shape[1:]
    assert torch.allclose(x.value, value, rtol=1e-12, atol=1e-12)
    assert torch.allclose(x.parts, parts, rtol=1e-12, atol=1e-12)
    assert torch.allclose(x.parts.sum(0), value, rtol=1e-12, atol=1e-12)


def by_derivative(f: Rule, streams: list[Parts]) -> Tensor:
    """The parts of what is linear: its derivative along each part, and its constant in channel 0."""
    values = tuple(s.value for s in streams)
    out = [torch.func.jvp(f, values, tuple(s.parts[c] for s in streams))[1] for c in range(CHANNELS)]
    out[0] = out[0] + f(*(torch.zeros_like(v) for v in values))
    return torch.stack(out)


# ---- what is linear

C = noise(2, 5, 4, seed=9)
MASK = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 1, 1, 0]], dtype=torch.bool)
PLACES = torch.tensor([0, 0, 2])
ONES = torch.zeros(2, 1, 4, dtype=torch.long)
W = noise(3, 4, seed=8)

ONE: dict[str, Rule] = {
    "x + c": lambda x: x + C,
    "x + 2": lambda x: x + 2.0,
    "2 + x": lambda x: 2.0 + x,
    "x + more axes": lambda x: x + noise(3, 2, 5, 4),
    "fewer axes": lambda x: x[0, 0] + C,
    "alpha": lambda x: torch.add(C, x, alpha=0.3),
    "x - c": lambda x: x - C,
    "c - x": lambda x: C - x,
    "2 - x": lambda x: 2.0 - x,
    "rsub alpha": lambda x: torch.rsub(x, C, alpha=0.3),
    "x c": lambda x: x * C,
    "c x": lambda x: C[0] * x,
    "more axes times": lambda x: x * noise(3, 1, 5, 4),
    "x / c": lambda x: x / (C.abs() + 1),
    "-x": lambda x: -x,
    "x @ c": lambda x: x @ noise(4, 3),
    "x @ more axes": lambda x: x @ noise(3, 2, 4, 6),
    "x @ vector": lambda x: x @ noise(4),
    "c @ x": lambda x: noise(5, 5) @ x,
    "more axes @ x": lambda x: noise(3, 1, 6, 5) @ x,
    "mm": lambda x: torch.mm(x[0], noise(4, 2)),
    "bmm": lambda x: torch.bmm(noise(2, 3, 5), x),
    "addmm": lambda x: torch.addmm(noise(3), x[0], noise(4, 3), beta=0.5, alpha=2.0),
    "addmm of x": lambda x: torch.addmm(x[0], noise(5, 5), C[0]),
    "baddbmm": lambda x: torch.baddbmm(noise(2, 3, 4), noise(2, 3, 5), x, beta=0.3, alpha=0.7),
    "linear": lambda x: functional.linear(x, W, noise(3)),
    "linear without bias": lambda x: functional.linear(x, W),
    "conv1d": lambda x: functional.conv1d(x, noise(6, 5, 2), noise(6), padding=1),
    "conv1d without batch": lambda x: functional.conv1d(x[0], noise(6, 5, 2), noise(6)),
    "conv2d in groups": lambda x: functional.conv2d(x[:, :4, None], noise(8, 1, 1, 3), noise(8), groups=4),
    "conv_transpose1d": lambda x: functional.conv_transpose1d(x, noise(5, 3, 2), noise(3)),
    "einsum": lambda x: torch.einsum("bij,jk->bik", x, W.T),
    "einsum ...": lambda x: torch.einsum("kj,...j->...k", W, x),
    "batch_norm": lambda x: functional.batch_norm(x, noise(5), noise(5).abs() + 1, noise(5), noise(5)),
    "view": lambda x: x.view(-1, 4).unflatten(0, (5, 2)).transpose(0, 1).reshape(2, 20).contiguous(),
    "permute": lambda x: x.permute(2, 0, 1).flatten(1).unsqueeze(0).squeeze(0).T,
    "index": lambda x: x[:, 1:, None, ::2],
    "index by lists": lambda x: x[[0, 1], [2, 3]],
    "index by mask": lambda x: x[MASK],
    "index by mask and slice": lambda x: x[:, MASK[0], 1:],
    "split": lambda x: x.split([1, 3], -1)[1],
    "chunk": lambda x: torch.chunk(x, 2, -1)[0],
    "unbind": lambda x: x.unbind(1)[2],
    "iterate": lambda x: next(iter(x)),
    "mean": lambda x: x.mean(1, keepdim=True),
    "sum": lambda x: x.sum((0, 2)),
    "cumsum": lambda x: x.cumsum(1),
    "roll": lambda x: torch.roll(x, 1, 1),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1),
    "repeat": lambda x: x.repeat(1, 2, 1).repeat_interleave(2, 0),
    "gather": lambda x: x.gather(1, ONES),
    "index_select": lambda x: x.index_select(1, PLACES),
    "cat with constants": lambda x: torch.cat([C[:, :2], x], 1),
    "stack with constants": lambda x: torch.stack([x, C]),
    "where x else c": lambda x: torch.where(MASK[..., None], x, C),
    "where number else x": lambda x: torch.where(MASK[..., None], 3.0, x),
    "masked_fill": lambda x: x.masked_fill(MASK[..., None], 7.0),
    "masked_fill by tensor": lambda x: x.masked_fill(MASK[..., None], torch.tensor(7.0)),
    "pad": lambda x: functional.pad(x, (0, 0, 1, 2), value=2.0),
    "pad by reflection": lambda x: functional.pad(x, (2, 1), mode="reflect"),
    "diff": lambda x: x.diff(dim=1, prepend=C[:, :1]),
    "index_add into constants": lambda x: C.index_add(1, PLACES, x[:, :3], alpha=2.0),
    "scatter into constants": lambda x: C.scatter(1, ONES, x[:, :1]),
    "scatter_add": lambda x: C.scatter_add(1, ONES.expand(2, 5, 4), x),
    "index_put": lambda x: C.index_put((torch.tensor([0]), torch.tensor([1])), x[0, :1]),
    "index_fill": lambda x: x.index_fill(1, PLACES, 2.0),
    "interpolate": lambda x: functional.interpolate(x, size=8),
    "avg_pool1d": lambda x: functional.avg_pool1d(x, 2),
    "unfold": lambda x: functional.unfold(x[:, None], 2),
    "fft": lambda x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real,
    "rotation of complex numbers": lambda x: torch.view_as_real(
        torch.view_as_complex(x.reshape(2, 5, 2, 2)) * torch.polar(torch.ones(5, 2).double(), noise(5, 2))
    ),
    "dropout in evaluation": lambda x: functional.dropout(x, 0.5, training=False) + C,
    "sum of a list": lambda x: sum([x, C, x]),
    "zeros like": lambda x: torch.zeros_like(x) + x,
}


@pytest.mark.parametrize("name", ONE)
def test_linear_operations_carry_each_part_and_put_what_they_add_with_the_constants(name: str) -> None:
    x, f = stream(2, 5, 4), ONE[name]
    check(f(x), f(x.value), by_derivative(f, [x]))


TWO: dict[str, Rule] = {
    "x + y": lambda x, y: x + y,
    "alpha": lambda x, y: torch.add(x, y, alpha=0.3),
    "x - y": lambda x, y: x - y,
    "other axes": lambda x, y: x + y[0, 0],
    "cat": lambda x, y: torch.cat([x, y, C], 1),
    "where": lambda x, y: torch.where(MASK[..., None], x, y),
    "index_add": lambda x, y: x.index_add(1, PLACES, y[:, :3]),
    "masked_scatter": lambda x, y: x.masked_scatter(MASK[..., None], y),
    "addmm": lambda x, y: torch.addmm(x[0], y[0], noise(4, 4)),
}


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("channels", [CHANNELS, CHANNELS - 1])
def test_a_path_that_is_not_there_yet_is_zero(name: str, channels: int) -> None:
    # Of two operands one may have gone through fewer hops.
    x, y, f = stream(2, 5, 4), stream(2, 5, 4, seed=1, channels=channels), TWO[name]
    whole = Parts(y.value, torch.cat([y.parts, torch.zeros(CHANNELS - channels, 2, 5, 4)]), y.ledger)
    check(f(x, y), f(x.value, y.value), by_derivative(f, [x, whole]))


@settings(max_examples=60)
@given(st.data())
def test_operands_of_any_shapes_broadcast(data: Any) -> None:
    full = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))

    def part_of(shape: list[int]) -> list[int]:
        kept = shape[data.draw(st.integers(0, len(shape) - 1)) :]
        return [n if data.draw(st.booleans()) else 1 for n in kept]

    x, y, constant = stream(*part_of(full)), stream(*part_of(full), seed=1), noise(*part_of(full))
    for f in (lambda a, b: a + b * constant, lambda a, b: constant - a / 3 + b, lambda a, b: a - b):
        check(f(x, y), f(x.value, y.value), by_derivative(f, [x, y]))


# ---- in place


def in_place(statement: str) -> Rule:
    def f(x: Any, y: Any) -> Any:
        names = {"x": x, "y": y, "torch": torch, "m": MASK, "p": PLACES, "z": C.clone(), "ones": ONES}
        exec(statement, names)
        return names["z"] if statement.startswith("z") else names["x"]

    return f


@pytest.mark.parametrize(
    "statement",
    [
        "x += y",
        "x += 2.0",
        "x -= y",
        "x *= 3.0",
        "x /= 3.0",
        "x.add_(y, alpha=0.3)",
        "x.sub_(1.0)",
        "x.mul_(2.0)",
        "x.neg_()",
        "x.zero_()",
        "x.fill_(2.0)",
        "x.copy_(y)",
        "x.masked_fill_(m[..., None], 3.0)",
        "x.index_add_(1, p, y[:, :3])",
        "x[m] = 0.0",
        "x[m] = y[m]",
        "x[m] += y[m]",
        "x[:, 0] = 5.0",
        "x[..., 0] *= 3",
        "x[:, p[1:]] = y[:, :2]",
        "z += x",
        "z -= x",
        "z.copy_(x)",
        "z[m] = x[m]",
        "z[:, 1:3] = x[:, :2]",
        "z[:, 1:3] += x[:, :2]",
        "z.index_add_(1, p, x[:, :3])",
        "z.scatter_(1, ones, x[:, :1])",
        "z.index_put_((m,), x[m], accumulate=True)",
        "z.masked_scatter_(m[..., None].expand(2, 5, 4), x)",
    ],
)
def test_writing_into_streams_and_into_plain_tensors(statement: str) -> None:
    def copies(function: Rule) -> Rule:
        return lambda *values: function(*(v.clone() for v in values))

    x, y, f = stream(2, 5, 4), stream(2, 5, 4, seed=1), in_place(statement)
    values, parts = (x.value.clone(), y.value.clone()), (x.parts.clone(), y.parts.clone())
    zero = copies(f)(*(torch.zeros_like(v) for v in values))
    wanted = torch.stack([copies(f)(*(p[c] for p in parts)) - zero for c in range(CHANNELS)])
    wanted[0] += zero
    check(f(x, y), copies(f)(*values), wanted)


def test_an_activation_in_place_changes_its_operand() -> None:
    x = stream(2, 5, 4)
    value = x.value
    out = functional.relu(x, inplace=True)
    for result in (out, x):
        assert torch.equal(result.value, value.relu())
        assert torch.allclose(result.parts.sum(0), value.relu(), atol=1e-12)


def test_an_earlier_result_stays_when_its_source_is_written_into() -> None:
    # Parts are computed when they are asked for, after the model has gone on.
    x, y = stream(2, 5, 4), stream(2, 5, 4, seed=1)
    value, parts = x.value.clone(), x.parts.clone()
    copy, total = x.clone(), x + y
    x += 100.0
    check(copy, value, parts)
    check(total, value + y.value, parts + y.parts)


def test_a_constant_that_is_written_into_later_is_refused() -> None:
    x, plain = stream(2, 5, 4), C.clone()
    kept, lost = x + plain, x * plain
    _ = kept.parts
    plain.mul_(0.0)
    check(kept, x.value + C, by_derivative(lambda v: v + C, [x]))
    with pytest.raises(RcProbeError, match="written into a tensor"):
        _ = lost.parts


def test_writing_into_one_name_shows_under_the_other() -> None:
    x = stream(2, 5, 4)
    other, value = x, x.value
    x += 1.0
    assert torch.equal(other.value, value + 1.0)


# ---- what is held


def frozen_norm(x: Parts, axes: tuple[int, ...], centre: bool, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(value, parts) with the scale of the whole, in numpy; `axes` of the value."""
    value, parts = x.value.numpy(), x.parts.numpy()
    mean = value.mean(axes, keepdims=True) if centre else 0.0
    scale = 1 / np.sqrt(((value - mean) ** 2).mean(axes, keepdims=True) + eps)
    later = tuple(a + 1 for a in axes)
    middle = parts.mean(later, keepdims=True) if centre else 0.0
    return (value - mean) * scale, (parts - middle) * scale


def with_gain(found: tuple[np.ndarray, np.ndarray], gain: Tensor, bias: Tensor | None) -> list[Tensor]:
    value, parts = (torch.from_numpy(a) * gain for a in found)
    if bias is not None:
        value, parts[0] = value + bias, parts[0] + bias
    return [value, parts]


def test_norms_keep_their_scale() -> None:
    x, g, b = stream(2, 5, 4), noise(4, seed=2), noise(4, seed=3)
    by_token = frozen_norm(x, (2,), True, 1e-3)
    check(functional.layer_norm(x, (4,), g, b, 1e-3), *with_gain(by_token, g, b))
    check(functional.layer_norm(x, (4,), eps=1e-3), *map(torch.from_numpy, by_token))
    both = frozen_norm(x, (1, 2), True, 1e-5)
    check(functional.layer_norm(x, (5, 4), noise(5, 4)), *with_gain(both, noise(5, 4), None))
    square = frozen_norm(x, (2,), False, 1e-3)
    check(functional.rms_norm(x, (4,), g, 1e-3), *with_gain(square, g, None))
    by_hand = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
    check(g * by_hand, *with_gain(square, g, None))
    centred = x - x.mean(-1, keepdim=True)
    check(centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt(), *map(torch.from_numpy, by_token))
    check(
        functional.normalize(x, dim=-1), *(t / x.value.norm(dim=-1, keepdim=True) for t in (x.value, x.parts))
    )


def test_group_norm_keeps_the_scales_of_its_groups() -> None:
    x, g, b = stream(2, 4, 5), noise(4, 1, seed=2), noise(4, 1, seed=3)
    grouped = Parts(x.value.reshape(2, 2, 2, 5), x.parts.reshape(3, 2, 2, 2, 5), x.ledger)
    value, parts = frozen_norm(grouped, (2, 3), True, 1e-5)
    found = (value.reshape(2, 4, 5), parts.reshape(3, 2, 4, 5))
    check(functional.group_norm(x, 2, g[:, 0], b[:, 0]), *with_gain(found, g, b))


ACTIVATIONS: dict[str, Rule] = {
    "gelu": functional.gelu,
    "tanh gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "relu": functional.relu,
    "tanh": torch.tanh,
    "leaky": lambda x: functional.leaky_relu(x, 0.1),
    "elu": functional.elu,
    "squared relu": lambda x: torch.square(functional.relu(x)),
    "relu to the second": lambda x: functional.relu(x) ** 2,
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu by hand": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * torch.pow(x, 3)))),
    "gelu by erf": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "soft cap": lambda x: torch.tanh(x / 30) * 30,
    "relu by hand": lambda x: x * (x > 0).to(x.dtype),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_gates(name: str) -> None:
    """Each part times act(x) / x."""
    x, act = stream(2, 5, 4), ACTIVATIONS[name]
    value = act(x.value)
    check(act(x), value, x.parts * (value / x.value))


def test_an_activation_at_zero_takes_its_derivative() -> None:
    x = Parts(torch.zeros(2).double(), torch.tensor([[1.0, 2.0], [-1.0, -2.0]]).double(), ledger())
    check(functional.gelu(x), torch.zeros(2).double(), x.parts / 2)


def test_what_does_not_keep_zero_at_zero_is_held() -> None:
    for f in (torch.sigmoid, torch.exp, torch.cos, functional.softplus, lambda x: x.clamp(min=0.1)):
        out = f(stream(2, 5, 4))
        assert not isinstance(out, Parts | Unknown)


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n != "relu by hand"])
def test_gated_units_hold_their_gate(name: str) -> None:
    """GLU, SwiGLU, GEGLU …: act(gate) times the parts of the other, whichever way the activation is written."""
    x, y, act = stream(2, 5, 4), stream(2, 5, 4, seed=1), ACTIVATIONS[name]
    gate = act(x.value)
    for out in (act(x) * y, y * act(x)):
        check(out, gate * y.value, gate * y.parts)
        assert not out.bilinear


def test_glu_holds_the_sigmoid() -> None:
    x = stream(2, 5, 4)
    gate = torch.sigmoid(x.value[..., 2:])
    check(functional.glu(x), x.value[..., :2] * gate, x.parts[..., :2] * gate)


def test_a_product_of_two_streams_is_shared_and_told() -> None:
    x, y = stream(2, 5, 4), stream(2, 5, 4, seed=1)
    out = x * y
    check(out, x.value * y.value, (x.parts * y.value + x.value * y.parts) / 2)
    assert out.bilinear
    pairs = torch.einsum("bik,bjk->bij", x, y)
    halves = x.parts @ y.value.mT + x.value @ y.parts.mT
    check(pairs, x.value @ y.value.mT, halves / 2)
    assert pairs.bilinear and (pairs @ C + C[:, :, :1]).bilinear
    assert torch.einsum("bik,bjk->bij", x, x).bilinear and (x @ x.mT).bilinear


# ---- attention


def by_hand(q: Tensor, k: Tensor, mask: Tensor | None = None, scale: float | None = None) -> np.ndarray:
    """The pattern, in numpy."""
    scores = np.einsum("...id,...jd->...ij", q.numpy(), k.numpy())
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = np.where(mask.numpy(), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_patterns_are_held_and_values_go_through() -> None:
    x = stream(2, 3, 5, 4)
    q, k, v = x * 2.0, x.flip(2), x + 1.0
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    cases = [
        (torch.softmax(q @ k.mT / 2, -1) @ v, by_hand(q.value, k.value)),
        (torch.matmul(torch.softmax(q @ k.mT / 2, -1), v), by_hand(q.value, k.value)),
        (functional.scaled_dot_product_attention(q, k, v), by_hand(q.value, k.value)),
        (functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3), by_hand(q.value, k.value, causal, 0.3)),
        (functional.scaled_dot_product_attention(q, k, v, attn_mask=causal), by_hand(q.value, k.value, causal)),
    ]  # fmt: skip
    for out, pattern in cases:
        parts = np.einsum("...ij,c...jd->c...id", pattern, v.parts.numpy())
        check(out, torch.from_numpy(parts.sum(0)), torch.from_numpy(parts))


def test_groups_of_queries_share_values() -> None:
    q, k, v = stream(2, 4, 5, 4), stream(2, 2, 5, 4, seed=1), stream(2, 2, 5, 4, seed=2)
    out = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    for head in range(4):
        pattern = by_hand(q.value[:, head], k.value[:, head // 2])
        parts = torch.from_numpy(np.einsum("bij,cbjd->cbid", pattern, v.parts[:, :, head // 2].numpy()))
        check(out[:, head], parts.sum(0), parts)


def test_a_query_that_may_attend_to_nothing_gets_zeros() -> None:
    x = stream(2, 3, 5, 4)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    out = functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
    assert not out.parts[:, :, :, 2].any() and out.parts.isfinite().all()


def test_torchs_own_attention_layer() -> None:
    layer = torch.nn.MultiheadAttention(4, 2, dtype=torch.float64)
    with torch.no_grad():
        layer.in_proj_bias.copy_(noise(12))
        layer.out_proj.bias.copy_(noise(4))
    x = stream(5, 2, 4)
    out = layer(x, x, x)[0]
    q, k, v = (functional.linear(x.value, w, b) for w, b in zip(layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True))  # fmt: skip
    parts = torch.zeros(CHANNELS, 5, 2, 4, dtype=torch.float64)
    weight, bias = layer.in_proj_weight[8:], layer.in_proj_bias[8:]
    for head in range(2):
        own = slice(2 * head, 2 * head + 2)
        pattern = torch.from_numpy(
            by_hand(q[..., own].transpose(0, 1).detach(), k[..., own].transpose(0, 1).detach())
        )
        values = x.parts @ weight[own].T  # (channels, tokens, batch, 2)
        values[0] += bias[own]
        parts += torch.einsum("bij,cjbd->cibd", pattern, values) @ layer.out_proj.weight[:, own].T
    parts[0] += layer.out_proj.bias
    check(out, parts.sum(0).detach(), parts.detach())
    assert v.shape == x.shape


def test_what_gives_patterns_alone_is_never_taken_apart() -> None:
    asked = []

    def parts() -> Tensor:
        asked.append(1)
        return noise(CHANNELS, 2, 5, 4)

    questions = Parts(noise(CHANNELS, 2, 5, 4).sum(0), parts, ledger())
    v = stream(2, 5, 4)
    scores = functional.linear(questions, noise(4, 4)) @ functional.layer_norm(questions, (4,)).mT
    out = torch.softmax(scores.masked_fill(~MASK[:, None], -1e9), -1) @ v
    assert out.parts.shape == (CHANNELS, 2, 5, 4) and not asked
    assert (questions * 1.0).parts is not None and asked == [1]


# ---- choices: routing


def test_experts_take_the_tokens_that_are_routed_to_them() -> None:
    x, router, experts = stream(6, 4), noise(4, 3), noise(3, 4, 4)
    weights, chosen = torch.topk(torch.softmax(x @ router, -1), 2, -1)
    out = torch.zeros(6, 4, dtype=torch.float64)
    for expert in range(3):
        token, place = torch.where(chosen == expert)
        out.index_add_(0, token, functional.silu(x[token] @ experts[expert]) * weights[token, place, None])
    gates = (x.value @ router).softmax(-1)
    parts = torch.zeros(CHANNELS, 6, 4, dtype=torch.float64)
    for token in range(6):
        for expert in gates[token].topk(2).indices:
            inner = x.value[token] @ experts[expert]
            ratio = gates[token, expert] * functional.silu(inner) / inner
            parts[:, token] += x.parts[:, token] @ experts[expert] * ratio
    check(out, parts.sum(0), parts)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_largest_values_are_those_of_the_stream(dim: int) -> None:
    x = stream(2, 5, 4)
    for f in (lambda t: t.topk(2, dim), lambda t: t.sort(dim), lambda t: torch.topk(t, k=2, dim=dim)):
        places = f(x.value)[1]
        values, found = f(x)
        assert torch.equal(found, places)
        at = torch.stack([p.gather(dim, places) for p in x.parts])
        check(values, at.sum(0), at)


def test_choices_are_held() -> None:
    x = stream(2, 5, 4)
    assert type(x > 0) is Tensor and type(x.argmax(-1)) is Tensor and type(x.long()) is Tensor
    assert bool((x.to(torch.long) == x.value.long()).all())
    assert (x.max() > 0) and isinstance(float(x.sum()), float)


# ---- the ledger


def test_a_hop_makes_every_path_longer() -> None:
    parts = noise(5, 2)
    book = Ledger(fixed=1, group=2)
    longer = book.longer(parts)
    assert torch.equal(longer, torch.cat([parts[:1], torch.zeros(2, 2).double(), parts[1:]]))
    assert torch.equal(Ledger(fixed=5).longer(parts), parts)


def test_what_is_longer_than_the_longest_is_one_part() -> None:
    book = Ledger(fixed=1, group=1, longest=1)  # lengths 0, 1, and above
    parts = noise(4, 2)
    wanted = torch.stack([parts[0], torch.zeros(2).double(), parts[1], parts[2] + parts[3]])
    assert torch.allclose(book.longer(parts), wanted)


def test_constants_may_be_dropped() -> None:
    x = Parts(noise(2, 3).sum(0), noise(2, 3), Ledger(fixed=2))
    out = functional.linear(x + 1.0, noise(4, 3), noise(4))
    assert torch.allclose(out.parts, x.parts @ noise(4, 3).T)


# ---- what has no rule


def test_an_unknown_operation_is_remembered_by_its_name() -> None:
    x = stream(2, 5, 4)
    out = torch.relu(torch.special.erfcx(x) + 1.0) @ C.mT
    assert isinstance(out, Unknown) and out.op == "special_erfcx"
    assert torch.equal(out.value, torch.relu(torch.special.erfcx(x.value) + 1.0) @ C.mT)
    assert isinstance(x + out[..., :4], Unknown) and isinstance(
        functional.dropout(x, 0.5, training=True), Unknown
    )
    assert isinstance(torch.fft.hfft(torch.view_as_complex(x.reshape(2, 5, 2, 2))), Unknown)


def test_an_unknown_pattern_does_no_harm() -> None:
    x = stream(2, 5, 4)
    odd = torch.special.erfcx(x) @ x.mT
    check(torch.softmax(odd, -1) @ x, odd.value.softmax(-1) @ x.value, odd.value.softmax(-1) @ x.parts)


def test_what_is_written_into_by_an_unknown_operation_is_unknown() -> None:
    x = stream(2, 5, 4)
    x.exp_()
    assert isinstance(x, Unknown) and x.op == "exp_"


def test_values_do_not_leave_unmarked() -> None:
    x = stream(2, 5, 4)
    for leak in (x.numpy, x.tolist, lambda: torch.add(x, x, out=torch.empty(2, 5, 4))):
        with pytest.raises(RcProbeError, match=r"numpy|tolist|given tensor"):
            leak()


def test_what_is_written_into_a_view_is_written_into_the_whole() -> None:
    """Keys are put together so in DeepSeek's attention: an empty tensor, and copies into its slices."""
    x, y = stream(2, 5, 4), stream(2, 5, 3)
    whole = torch.full((2, 5, 7), 3.0, dtype=torch.float64)
    first, rest = whole[..., :4], whole[..., 4:]
    first.copy_(x)
    rest.copy_(y)
    assert isinstance(whole, Parts)
    assert torch.equal(whole.value, torch.cat([x.value, y.value], -1))
    assert torch.equal(whole.parts, torch.cat([x.parts, y.parts], -1))
    later = whole[:, 1:3]
    later.mul_(2.0)
    assert torch.equal(whole.value[:, 1:3], 2 * torch.cat([x.value, y.value], -1)[:, 1:3])
    assert torch.equal(whole.value[:, 3:], torch.cat([x.value, y.value], -1)[:, 3:])
    assert torch.equal(whole.parts[:, :, 1:3], 2 * torch.cat([x.parts, y.parts], -1)[:, :, 1:3])


def test_buffers_that_one_operation_reads_are_written_into_and_no_others() -> None:
    x = stream(2, 5, 4)
    weight = noise(4, 4, seed=3)
    image = x.parts @ weight.T
    alone = functional.linear(x, weight)
    assert torch.allclose((alone * 2.0).parts, image * 2, rtol=1e-12, atol=1e-12)
    assert torch.allclose(alone.parts, image, rtol=1e-12, atol=1e-12)  # computed anew for one who asks late

    shared = functional.linear(x, weight)
    double, triple, both = shared * 2.0, shared * 3.0, shared + x
    for made, wanted in ((double, image * 2), (triple, image * 3), (both, image + x.parts), (shared, image)):
        assert torch.allclose(made.parts, wanted, rtol=1e-12, atol=1e-12)
    twice = functional.linear(x, weight)
    assert torch.allclose((twice + twice).parts, image * 2, rtol=1e-12, atol=1e-12)
    once = functional.linear(x, weight)
    scaled = once * 2.0
    buffer = scaled._kept.take()[1]
    assert buffer is not None and buffer is not x.parts
    assert shared._kept.take()[1] is None and (x * 2.0)._kept.take()[1] is not x.parts
