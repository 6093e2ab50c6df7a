"""Split arithmetic is plain arithmetic, and goes on where plain arithmetic ends."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from support import high_precision_san as mpsan
from support import zoo
from torch import Tensor, nn
from torch.nn import functional

from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.proofs.replay import Replay, token_axis
from rc_probe.hooks.split import rules
from rc_probe.hooks.split.rules import Split, propagate, watching
from rc_probe.interventions.paper import paper_variants

T, D, H = 5, 12, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stream(size: float = 1.0, seed: int = 1) -> Split:
    """A centre of size 1 and a residual of the given size, (1, T, D)."""
    return Split(normal(1, 1, D, seed=seed), size * normal(1, T, D, seed=seed + 50))


def heads(x: Any) -> Any:
    return x.view(1, T, H, -1).transpose(1, 2)


def merged(x: Any) -> Any:
    return x.transpose(1, 2).contiguous().view(1, T, -1)


W, W2, B = normal(D, D, seed=2), normal(D, D, seed=3), normal(D, seed=4)
ROWS, BIAS = normal(1, T, 1, seed=5), normal(1, H, T, T, seed=6)
BEHIND = torch.ones(T, T, dtype=torch.bool).triu(1)
PADS = torch.tensor([False, False, False, True, True])


def scores(x: Any) -> Any:
    return heads(x @ W) @ heads(x @ W2).transpose(2, 3)


def attend(x: Any, pattern: Any) -> Any:
    return merged(pattern @ heads(x))


def rms_by_hand(x: Any) -> Any:
    y = x.to(torch.float64)
    return B * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotary(x: Any) -> Any:
    angle = torch.arange(T, dtype=torch.float64)[:, None] / 3
    y = heads(x)
    half = y.shape[-1] // 2
    return y * angle.cos() + torch.cat((-y[..., half:], y[..., :half]), dim=-1) * angle.sin()


def folded(x: Any) -> Any:
    """As BLOOM: heads within the batch, a bias of the keys, scores by baddbmm."""
    q, k, v = (heads(y).reshape(H, T, -1) for y in (x @ W, x @ W2, x))
    s = BIAS[0, :, :1].baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=0.5, alpha=0.25)
    pattern = functional.softmax(s.view(1, H, T, T), dim=-1).view(H, T, T)
    return merged(torch.bmm(pattern, v).view(1, H, T, -1))


STREAM_OPS: dict[str, Callable[[Any], Any]] = {
    "linear": lambda x: functional.linear(x, W, B),
    "Conv1D": lambda x: torch.addmm(B, x.view(-1, D), W).view(x.size()),
    "matmul": lambda x: x @ W,
    "layer_norm": lambda x: functional.layer_norm(x, (D,), B, 2 * B, 1e-3),
    "rms_norm": lambda x: functional.rms_norm(x, (D,), B, 1e-3),
    "RMSNorm by hand": rms_by_hand,
    "norm by division": lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt(),
    "reciprocal": lambda x: x * (2 / (x**2 + 1)) + 1 / (x.pow(2) + 2),
    "add and scale": lambda x: 3 - (2 * x + B) / 7 * B - torch.add(x, x, alpha=0.5),
    "in place": lambda x: x.clone().add_(B).mul_(2),
    "product of two streams": lambda x: x * (x @ W),
    "split": lambda x: torch.cat([c * (i + 1) for i, c in enumerate(x.split(4, dim=2))], dim=-1),
    "chunk and stack": lambda x: torch.stack(x.chunk(3, -1), -1).flatten(-2),
    "unbind": lambda x: x.view(1, T, 3, 4).unbind(2)[1].repeat_interleave(3, dim=-1),
    "iterate": lambda x: torch.cat([2 * y for y in x.view(1, T, 3, 4).permute(2, 0, 1, 3)], dim=-1),
    "permute": lambda x: x.permute(1, 0, 2).reshape(T, 1, 3, 4).permute(1, 0, 3, 2).reshape(1, T, D),
    "index": lambda x: x[:, :, None, ::2].expand(1, T, 2, D // 2).reshape(1, T, D),
    "constant mask of tokens": lambda x: x * torch.ones(1, T, 1),
    "dropout when off": lambda x: functional.dropout(x, 0.5, training=False),
}
ATTENTIONS: dict[str, Callable[[Any], Any]] = {
    "eager": lambda x: attend(x, torch.softmax(scores(x) * 0.3, dim=-1)),
    "float32 softmax": lambda x: attend(x, torch.softmax(scores(x) / 3, -1, dtype=torch.float64).to(x.dtype)),
    "large scores": lambda x: attend(x, torch.softmax(scores(x) * 20, dim=-1)),
    "padding": lambda x: attend(x, torch.softmax(scores(x) + PADS * torch.finfo(torch.float32).min, dim=-1)),
    "padding, a row each": lambda x: attend(
        x, torch.softmax(scores(x).masked_fill(PADS.expand(1, 1, T, T), -math.inf), dim=-1)
    ),
    "causal": lambda x: attend(x, torch.softmax(scores(x).masked_fill(BEHIND, -1e9), dim=-1)),
    "kept above the least float": lambda x: attend(
        x, torch.softmax(torch.max(scores(x), torch.tensor(torch.finfo(torch.float32).min)), dim=-1)
    ),
    "causal by where": lambda x: attend(x, torch.softmax(torch.where(~BEHIND, scores(x), -1e9), dim=-1)),
    "bias added in place": lambda x: attend(x, torch.softmax(scores(x).add_(BIAS), dim=-1)),
    "folded heads": folded,
    "sdpa": lambda x: merged(functional.scaled_dot_product_attention(heads(x @ W), heads(x @ W2), heads(x))),
    "sdpa, causal, own scale": lambda x: merged(
        functional.scaled_dot_product_attention(
            heads(x @ W), heads(x @ W2), heads(x), is_causal=True, scale=0.1
        )
    ),
    "sdpa, bool mask": lambda x: merged(
        functional.scaled_dot_product_attention(
            heads(x @ W), heads(x @ W2), heads(x), ~PADS.expand(1, 1, T, T)
        )
    ),
    "sdpa, grouped": lambda x: merged(
        functional.scaled_dot_product_attention(
            heads(x @ W), heads(x @ W2)[:, :1], heads(x)[:, :1], enable_gqa=True
        )
    ),
    "rotary": lambda x: attend(x, torch.softmax(rotary(x @ W) @ rotary(x @ W2).mT, dim=-1)),
    "soft cap": lambda x: attend(x, torch.softmax(torch.tanh(rotary(x) @ rotary(x).mT / 5) * 5, dim=-1)),
}
COMMON_ROW = [name for name in ATTENTIONS if not any(w in name for w in ("causal", "bias", "rotary", "cap"))]


def assert_close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("name", [*STREAM_OPS, *ATTENTIONS])
def test_the_sum_of_the_parts_is_plain_arithmetic(name: str) -> None:
    op, x = (STREAM_OPS | ATTENTIONS)[name], stream()
    out, plain = propagate(op, x), op(x.dense())
    assert_close(out.dense(), plain, 1e-13)
    assert_close(out.residual, plain - plain.mean(1, keepdim=True), 1e-12)
    assert out.center.shape[1] == 1


@pytest.mark.parametrize("name", STREAM_OPS)
def test_a_tiny_residual_goes_through_as_the_derivative_says(name: str) -> None:
    op, x = STREAM_OPS[name], stream(1e-60)
    x = x.recentred()
    _, slope = torch.func.jvp(op, (x.center.expand(x.shape).clone(),), (x.residual * 1e60,))
    assert_close(op(x).residual * 1e60, slope, 1e-12)


@pytest.mark.parametrize("name", COMMON_ROW)
def test_attention_with_a_common_row_is_of_third_order(name: str) -> None:
    larger, smaller = (propagate(ATTENTIONS[name], stream(size)).residual for size in (1e-40, 1e-44))
    assert 0 < float(larger.abs().max()) < 1e-110
    assert_close(smaller * 1e12, larger, 1e-10)


def test_attention_and_norm_agree_with_exact_arithmetic() -> None:
    x = stream(1e-50)
    eps, gain = 1e-3, B.abs() + 1
    zero = torch.zeros(D, dtype=torch.float64)
    out = propagate(
        lambda y: functional.layer_norm(
            ATTENTIONS["sdpa"](functional.rms_norm(y, (D,), None, eps)), (D,), gain, B, eps
        ),
        x,
    )
    with mpmath.workdps(400):
        rows = [[c + r for c, r in zip(*pair, strict=True)] for pair in _exact_rows(x)]
        sizes = [mpmath.sqrt(mpmath.fsum(v * v for v in row) / D + mpmath.mpf(eps)) for row in rows]
        rows = [[v / size for v in row] for row, size in zip(rows, sizes, strict=True)]
        mixed = mpsan.attention(mpsan.affine(rows, W.T, zero), mpsan.affine(rows, W2.T, zero), rows, H)
        expected = mpsan.residual(mpsan.layer_norm(mixed, gain, B, eps))
        largest = max(abs(v) for row in expected for v in row)
        wrong = max(
            abs(mpmath.mpf(v) - e)
            for row, exact in zip(out.residual[0].tolist(), expected, strict=True)
            for v, e in zip(row, exact, strict=True)
        )
        assert mpmath.mpf("1e-160") < largest < mpmath.mpf("1e-140")
        assert wrong < largest * mpmath.mpf("1e-11")


def _exact_rows(x: Split) -> list[tuple[list[mpmath.mpf], list[mpmath.mpf]]]:
    center = mpsan.exact(x.center[0])[0]
    return [(center, row) for row in mpsan.exact(x.residual[0])]


def test_float32_weights_are_used_exactly() -> None:
    x, layer = stream(), nn.Linear(D, D)
    with torch.no_grad():
        single = layer(x)
        double = nn.Linear(D, D).double()
        double.load_state_dict(layer.state_dict())
        assert torch.equal(single.residual, double(x).residual)
        assert torch.equal(single.center, double(x).center)


@pytest.mark.parametrize(
    "cast", [lambda x: x.float(), lambda x: x.to(torch.bfloat16), lambda x: x.type_as(B.half())]
)
def test_casts_do_not_round(cast: Callable[[Any], Any]) -> None:
    x = stream(1e-30)
    assert torch.equal(cast(x).residual, x.residual)
    assert cast(x).dtype is torch.float64


def test_sums_do_not_round() -> None:
    x = stream(1e-30)
    assert torch.equal(
        x.mean(-1, keepdim=True, dtype=torch.float32).residual, x.residual.mean(-1, keepdim=True)
    )


def test_a_copied_operand_has_the_values_of_its_source() -> None:
    x, y = stream(), stream(seed=8)
    assert torch.equal(x.clone().copy_(y).residual, y.residual)
    assert torch.equal(x.clone().copy_(x.dense()).dense(), x.dense())


@pytest.mark.parametrize(
    ("op", "words"),
    [
        (functional.gelu, "`gelu` has no rule"),
        (lambda x: functional.gelu(x @ W) @ W2 + x, "`gelu` has no rule"),
        (lambda x: torch.softmax(x, dim=-1), "`softmax` has no rule"),
        (lambda x: torch.softmax(scores(x), dim=-2) @ heads(x), "`softmax` has no rule"),
        (lambda x: (torch.softmax(scores(x), dim=-1) * 0.5) @ heads(x), "`mul` has no rule"),
        (lambda x: attend(x, torch.softmax(torch.tanh(scores(x)), dim=-1)), "`tanh` has no rule"),
        (
            lambda x: attend(x, torch.softmax(torch.tanh(scores(x).masked_fill(BEHIND, -1e9)), dim=-1)),
            "`tanh` has no rule",
        ),
        (lambda x: functional.dropout(x, 0.5, training=True), "`dropout` has no rule"),
        (lambda x: x.view(1, T, D).roll(1, 2), "`roll` has no rule"),
        (lambda x: x.mean(1, keepdim=True) + x, "`mean` has no rule"),
        (lambda x: x @ (x.mT @ x), "`matmul` has no rule"),
        (lambda x: attend(x, torch.softmax(scores(x) * B[:T], dim=-1)), "`mul` has no rule"),
        (
            lambda x: attend(x, torch.softmax(scores(x).masked_fill(PADS, 0.0), dim=-1)),
            "`masked_fill` has no rule",
        ),
        (lambda x: attend(x, torch.softmax(scores(x).clamp(min=0.0), dim=-1)), "`clamp` has no rule"),
        (lambda x: torch.softmax(scores(x).view(1, H * T, T), dim=-1) @ x, "`view` has no rule"),
        (lambda x: attend(x, functional.dropout(torch.softmax(scores(x), dim=-1))), "`dropout` has no rule"),
        (lambda x: x[:, 0], "`__getitem__` has no rule"),
        (lambda x: torch.zeros(1, T, D).double().add_(x), "`add_` takes the stream out"),
        (lambda x: torch.tensor(x.tolist()), "`tolist` takes the stream out"),
        (lambda x: x + ROWS, "depends on the position"),
        (lambda x: torch.ones(1, T, D), "not computed from its input"),
        (lambda x: x / 0, "not finite"),
        (lambda x: x @ torch.ones(D + 1, D), "does not run in split arithmetic"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(op: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(RcProbeError, match=words):
        propagate(op, stream())


def test_a_lost_branch_that_is_switched_off_does_no_harm() -> None:
    def off_in_place(x: Any) -> Any:
        lost = functional.gelu(x @ W)
        lost.copy_(torch.zeros_like(lost))
        lost += x
        return lost

    x = stream()
    for op in (
        lambda x: torch.zeros_like(functional.gelu(x)) + x,
        lambda x: x + 0 * torch.zeros_like(x),
        off_in_place,
    ):
        assert torch.equal(propagate(op, x).residual, x.recentred().residual)


def test_in_place_changes_are_seen_by_every_holder() -> None:
    x = stream()
    kept = x.clone()
    other = kept
    kept += x
    assert torch.equal(other.residual, 2 * x.residual)
    kept[:, 0] = 0
    with pytest.raises(RcProbeError, match="__setitem__"):
        propagate(lambda _: other, x)


def test_a_row_that_is_masked_throughout_is_finite() -> None:
    none = torch.zeros(T, T).index_fill(0, torch.tensor([1]), -math.inf)
    out = propagate(lambda x: attend(x, torch.softmax(scores(x) + none, dim=-1)), stream())
    assert out.dense().isfinite().all()


def test_the_mean_is_that_of_the_real_tokens() -> None:
    x, real = normal(1, T, D), ~PADS
    split = Split.of(x, mask=real)
    assert_close(split.center[0], x[0, real].mean(0, keepdim=True), 1e-14)
    assert_close(split.residual[:, real].sum(1) + 1, torch.ones(1, D, dtype=torch.float64), 1e-14)
    assert_close(split.dense(), x, 1e-14)


def test_tokens_may_come_first() -> None:
    x = normal(T, 1, D)
    out = propagate(lambda y: functional.layer_norm(y @ W, (D,)), Split.of(x, axis=0))
    assert out.axis == -3
    assert_close(out.dense(), functional.layer_norm(x @ W, (D,)), 1e-13)


def test_watching_sees_and_replaces_attentions() -> None:
    x, put = stream(), Split(torch.zeros(1, H, 1, 4).double(), normal(1, H, T, 4, seed=9))
    with watching() as watch:
        ATTENTIONS["eager"](x)
    (seen,) = watch.seen
    assert seen.query.source is not None
    assert torch.equal(seen.query.source[1].residual, x.residual)
    assert_close(seen.pattern.scores.rest, seen.query.residual @ seen.key.residual * 0.3, 1e-14)
    with watching(lambda out: put):
        out = ATTENTIONS["eager"](x)
    assert torch.equal(out.residual, merged(put.residual))


# ---- real blocks of the library, as pure attention

REFUSED = {"xlnet", "xlnet_two_streams", "deberta_v2", "deberta_v2_conv", "swin"}
CASTS = {
    "float32 inside",
    "modernbert",
    "t5_encoder",
    "gptj",
    "bloom",
    "bloom_post_norm",
    "llama",
    "mistral",
    "qwen3",
    "mixtral",
    "olmo2",
}


def pure_attention(name: str, dtype: torch.dtype) -> tuple[Any, Tensor, Callable[[Any, Any], Any], list[Any]]:
    model, inputs = zoo.build(name, dtype=dtype)
    structure = find_structure(model, inputs)
    san = paper_variants(structure)[0].edits(structure)
    one: dict[str, Any] = {key: value[:1] for key, value in inputs.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        one["use_cache"] = False
    replay = Replay(structure)
    with measuring(model), replay:
        model(**one)
    return model, replay.stream(structure.blocks[0]), lambda b, x: replay.run(b, x, san), structure.blocks


@pytest.mark.parametrize("name", [n for n in zoo.TRANSFORMERS if n not in REFUSED])
def test_blocks_of_the_library_run_on_split_streams(name: str) -> None:
    dtype = torch.float64 if torch.float64 in zoo.ZOO[name].dtypes else torch.float32
    model, x, run, blocks = pure_attention(name, dtype)
    split, plain = Split.of(x, token_axis(blocks[0]) - x.ndim), x
    tolerance = 2e-6 if dtype is torch.float32 or name in CASTS else 1e-13
    with measuring(model):
        for block in blocks:
            split, plain = propagate(lambda y, b=block: run(b, y), split), run(block, plain)
            assert_close(split.dense(), plain.double(), tolerance)


@pytest.mark.parametrize(("name", "op"), [("xlnet", "einsum"), ("deberta_v2", "gather"), ("swin", "view")])
def test_blocks_without_a_rule_are_refused(name: str, op: str) -> None:
    model, x, run, blocks = pure_attention(name, torch.float32)
    with measuring(model), pytest.raises(RcProbeError, match=f"`{op}` has no rule"):
        for block in blocks:
            propagate(lambda y, b=block: run(b, y), Split.of(x, token_axis(blocks[0]) - x.ndim))


def test_the_token_axis_is_looked_for_once_for_each_operation_and_its_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[Tensor] = []
    find = rules._token_axis
    monkeypatch.setattr(rules, "_known_axes", {})
    monkeypatch.setattr(rules, "_token_axis", lambda number: looked.append(number) or find(number))
    one, other = (Split.of(torch.randn(1, 3, 4, 5, dtype=torch.float64), axis) for axis in (-2, -3))
    for x, axis, count in ((one, -1, 1), (one, -1, 1), (other, -3, 2), (one, -1, 2)):
        moved = x.transpose(-1, -2)
        assert isinstance(moved, Split) and (moved.axis, len(looked)) == (axis, count)
        torch.testing.assert_close(moved.dense(), x.dense().mT)
    for index, axis in ((torch.tensor([0, 1]), -2), (torch.tensor([1, 0]), -2)):
        before = len(looked)
        assert one.index_select(-1, index).axis == axis and len(looked) == before + 1
    assert isinstance(one.unbind(1)[2], Split) and len(one.unbind(1)) == 3
