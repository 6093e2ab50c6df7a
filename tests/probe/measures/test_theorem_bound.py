"""The bound of theorems 2.2 and 2.3 holds, and is computed from what the model really does."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import zoo
from torch import Tensor
from torch.nn import functional

from rc_probe.hooks.attach import Replay, find_structure
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.split.rules import Split
from rc_probe.interventions.paper import paper_variants
from rc_probe.measures.below_floor.layer_weights import Heads, attention_branch, one_sample, take_apart
from rc_probe.measures.below_floor.recursion import recursion
from rc_probe.measures.below_floor.theorem_bound import (
    SPREAD,
    Bounds,
    layer_bound,
    unrolled,
    why_unrolled_is_vacuous,
)
from rc_probe.metrics.norms import composite_norm as composite


def random_layer(seed: int) -> tuple[Tensor, Heads, Tensor]:
    """X (T, D), heads of all shapes and sizes, a bias of the queries."""
    g = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=g))

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        scale = 10 ** ((torch.rand(1, generator=g) - 0.5) * spread)
        heavy = torch.rand(1, generator=g) < 0.3
        x = torch.randn(*shape, generator=g)
        return ((x**3 if heavy else x) * scale).double()

    T, D, H, d_qk, d_v = between(2, 23), between(2, 23), between(1, 5), between(1, 9), between(1, 9)
    x = normal(T, D) * (torch.rand(T, 1, generator=g) < 0.7) + normal(1, D)
    heads = Heads(*(normal(H, *s, spread=3) for s in ((D, d_qk), (D, d_qk), (D, d_v), (d_v, D))))
    per_head = 10 ** (2 * torch.rand(H, 1, 1, generator=g).double())
    return x, Heads(heads.w_q, heads.w_k, heads.w_v * per_head, heads.w_o), normal(H, 1, d_qk)


def run_layer(x: Tensor, heads: Heads, b_q: Tensor) -> Tensor:
    scores = (x @ heads.w_q + b_q) @ (x @ heads.w_k).mT / math.sqrt(heads.w_q.shape[-1])
    return (torch.softmax(scores, -1) @ (x @ heads.w_v) @ heads.w_o).sum(0)


def scaled_to(x: Tensor, heads: Heads, spread: float) -> Heads:
    """The same heads with queries so small that the scores spread by `spread` at most."""
    found = layer_bound(x - x.mean(0), heads)["spread"]
    return Heads(
        heads.w_q * min(1.0, spread / found) if found else heads.w_q, heads.w_k, heads.w_v, heads.w_o
    )


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_the_inequality_holds(start: int) -> None:
    ratios = []
    for seed in range(start, start + 50):
        x, heads, b_q = random_layer(seed)
        heads = scaled_to(x, heads, SPREAD)
        found = layer_bound(x - x.mean(0), heads)
        assert found["spread"] <= SPREAD * (1 + 1e-12)
        out = run_layer(x, heads, b_q)
        floor = 1e-13 * float(composite(out))
        residual = float(composite(out - out.mean(0)))
        assert residual <= found["bound_out"] + floor
        ratios.append(residual / found["bound_out"] if residual > 1e3 * floor else 0.0)
    assert max(ratios) > 1e-4  # a bound far above all would prove nothing


def test_constants_by_brute_force() -> None:
    x, heads, _ = random_layer(7)
    r = (x - x.mean(0)).numpy()
    H, d_qk = heads.w_q.shape[0], heads.w_q.shape[2]
    assert H > 1
    found = layer_bound(x - x.mean(0), heads)
    betas, spreads, columns, rows = [], [], 0.0, 0.0
    for h in range(H):
        w_qk = (heads.w_q[h] @ heads.w_k[h].T).numpy()
        w = (heads.w_v[h] @ heads.w_o[h]).numpy()
        e = r @ w_qk @ r.T / np.sqrt(d_qk)
        D = [max(abs(a - b) for a in row for b in row) for row in e]
        betas.append(np.linalg.norm(w_qk, 1) * np.sqrt(np.linalg.norm(w, 1) * np.linalg.norm(w, np.inf)))
        spreads.append(max(D))
        columns += sum(D) / (2 * np.linalg.norm(e, 1)) * np.linalg.norm(w_qk, 1) * np.linalg.norm(w, 1)
        rows += max(D) / (2 * np.linalg.norm(e, 1)) * np.linalg.norm(w_qk, 1) * np.linalg.norm(w, np.inf)
    size = np.sqrt(np.linalg.norm(r, 1) * np.linalg.norm(r, np.inf))
    assert (found["heads"], found["d_qk"]) == (H, d_qk)
    assert found["beta"] == pytest.approx(max(betas), rel=1e-12)
    assert found["spread"] == pytest.approx(max(spreads), rel=1e-12)
    assert found["residual_in"] == pytest.approx(size, rel=1e-12)
    assert found["coefficient"] == pytest.approx(4 * np.sqrt(columns * rows) / np.sqrt(d_qk), rel=1e-12)
    assert found["coefficient"] == pytest.approx(
        4 * found["gamma"] * found["beta"] * H / np.sqrt(d_qk), rel=1e-12
    )
    assert found["bound_out"] == pytest.approx(found["coefficient"] * size**3, rel=1e-9)


def test_gamma_of_one_head_is_that_of_its_spreads() -> None:
    x, many, _ = random_layer(7)
    heads = Heads(many.w_q[:1], many.w_k[:1], many.w_v[:1], many.w_o[:1])
    r = x - x.mean(0)
    e = (r @ heads.w_q[0]) @ (r @ heads.w_k[0]).T
    d = e.amax(1) - e.amin(1)
    expected = float((d.sum() * d.max()).sqrt() / (2 * e.abs().sum(0).max()))
    assert layer_bound(r, heads)["gamma"] == pytest.approx(expected, rel=1e-12)


def test_the_composite_norm_does_not_underflow() -> None:
    x = random_layer(3)[0]
    size = np.sqrt(np.linalg.norm(x.numpy(), 1) * np.linalg.norm(x.numpy(), np.inf))
    assert float(composite(x * 1e-170)) == pytest.approx(size * 1e-170, rel=1e-12, abs=0)


def test_constants_do_not_depend_on_a_tiny_size() -> None:
    x, heads, _ = random_layer(3)
    r = x - x.mean(0)
    near, far = layer_bound(r * 1e-3, heads), layer_bound(r * 1e-170, heads)
    for name in ("beta", "gamma", "coefficient"):
        assert far[name] == pytest.approx(near[name], rel=1e-9)
    assert far["residual_in"] == pytest.approx(near["residual_in"] * 1e-167, rel=1e-9, abs=0)
    assert layer_bound(r * 0, heads)["bound_out"] == 0


def test_where_it_is_vacuous() -> None:
    x, heads, _ = random_layer(7)
    r = (x - x.mean(0)) / composite(x - x.mean(0))
    small = 0.1 / math.sqrt(layer_bound(r, heads)["coefficient"])
    fine, wide = layer_bound(r * small, heads), layer_bound(r * 1e6, heads)
    assert (fine["vacuous"], fine["reason"]) == (False, "")
    assert wide["vacuous"]
    assert "the theorem allows 1.256" in wide["reason"]
    tame = scaled_to(x, heads, 1.0)
    loud = Heads(tame.w_q, tame.w_k, tame.w_v * 1e4, tame.w_o)
    assert "any attention patterns" in layer_bound(x - x.mean(0), tame)["reason"]
    still = Heads(tame.w_q * 1e-4, tame.w_k, loud.w_v * 1e4, tame.w_o)
    assert "does not promise a smaller residual" in layer_bound(x - x.mean(0), still)["reason"]


def test_no_infinity_in_the_table() -> None:
    x, heads, _ = random_layer(7)
    found = layer_bound((x - x.mean(0)) * 1e120, heads)
    assert found["bound_out"] is None
    assert found["vacuous"]


def test_the_unrolled_bound_is_theorem_2_2() -> None:
    c, r0 = 0.3, 0.7
    rows = [{"coefficient": c, "residual_in": r0, "residual_out": 0.1}]
    for _ in range(3):
        rows.append({"coefficient": c / 2, "residual_in": 0.1, "residual_out": 0.1})
    for layer, found in enumerate(unrolled(rows), start=1):
        assert found == pytest.approx(
            (3**layer - 1) / 2 * math.log10(c) + 3**layer * math.log10(r0), rel=1e-12
        )
    rows[1]["residual_in"] = 0.4  # a norm that makes the residual four times larger
    assert unrolled(rows)[1] == pytest.approx(4 * math.log10(c / 2 * 64) + 9 * math.log10(r0), rel=1e-12)
    assert unrolled(rows * 300)[-1] is None


def chained(*, c: float = 0.3, spread: float = 0.2, r1: float = 0.1, trivial: float = 0.3) -> list[Any]:
    """Two layers: .7 enters, .1 leaves, `r1` enters; any patterns give at most 2 and `trivial`."""
    first = {"coefficient": c, "residual_in": 0.7, "residual_out": 0.1, "spread": spread, "trivial_out": 2.0}
    return [first, first | {"coefficient": 0.15, "residual_in": r1, "spread": 0.1, "trivial_out": trivial}]


@pytest.mark.parametrize(
    ("rows", "first", "second"),
    [
        (
            chained(),
            "",
            "",
        ),  # c r² = .3 × .49; the bounds are 10^-.99 and 10^-3.49, any patterns give 2 and 6
        (chained(c=1.6), "", ""),  # 1.6 × .49, though 1.6 × .7 is over 1
        (chained(c=3.0), "10^0.167, not below 1", "10^0.167, not below 1"),  # 3 × .49
        (chained(r1=0.4), "", "10^0.672, not below 1"),  # the norm: .15 × 4³ × .49
        (chained(spread=1.3), "spread by 1.3 within", "spread by 1.3 within"),  # a step that is not covered
        (chained(trivial=2e-5), "", ""),  # 2 × 2e-5 / .1 = 10^-3.40
        (chained(trivial=1e-5), "", "not below 10^-3.7, which holds for any"),  # 2 × 1e-5 / .1
    ],
)
def test_where_the_unrolled_bound_is_vacuous(rows: list[Any], first: str, second: str) -> None:
    for said, wanted in zip(why_unrolled_is_vacuous(rows), (first, second), strict=True):
        assert bool(said) == bool(wanted) and wanted in said


def test_an_unrolled_bound_beyond_floats() -> None:
    """Below all floats it says something, above all it does not; nothing is divided by zero."""
    deep = chained() + [chained()[1]] * 700
    assert unrolled(deep)[-1] is None and set(why_unrolled_is_vacuous(deep)) == {""}
    loud = [chained(c=3.0)[0]] * 700
    assert unrolled(loud)[-1] is None and all(why_unrolled_is_vacuous(loud))
    assert why_unrolled_is_vacuous([]) == []


def test_the_unrolled_bound_of_a_random_network_is_flagged_where_one_layer_is_not() -> None:
    """The bound of a layer starts from the measured residual, which is small by then; the unrolled one does not."""
    g = torch.Generator().manual_seed(0)
    x, rows = torch.randn(8, 16, generator=g).double() * 0.02, []
    for scale in (1.0, 0.01, 0.01):  # the first layer lets its residual through
        heads = Heads(*(torch.randn(4, *s, generator=g).double() for s in ((16, 4),) * 3 + ((4, 16),)))
        heads = Heads(heads.w_q, heads.w_k, heads.w_v * scale, heads.w_o)
        row = layer_bound(x - x.mean(0), heads)
        x = run_layer(x, heads, torch.zeros(4, 1, 4).double())
        rows.append(row | {"residual_out": float(composite(x - x.mean(0)))})
    assert not rows[-1]["vacuous"]
    found = unrolled(rows)[-1]
    assert found is not None and found > math.log10(rows[0]["residual_in"])
    assert "grows with depth" in why_unrolled_is_vacuous(rows)[-1]


def test_the_unrolled_bound_holds_for_a_network_with_norms() -> None:
    """Three layers of one width; what stands between them multiplies the residual."""
    tight = 0
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        x, rows = torch.randn(6, 5, generator=g).double(), []
        for _ in range(3):
            heads = Heads(
                *(torch.randn(2, *s, generator=g).double() for s in ((5, 3), (5, 3), (5, 4), (4, 5)))
            )
            heads = scaled_to(x, heads, 1.0)
            row = layer_bound(x - x.mean(0), heads)
            x = run_layer(x, heads, torch.zeros(2, 1, 3).double())
            rows.append(row | {"residual_out": float(composite(x - x.mean(0)))})
            x = functional.layer_norm(x, (5,))
        for row, log_bound in zip(rows, unrolled(rows), strict=True):
            assert log_bound is not None
            assert math.log10(row["residual_out"]) <= log_bound
            tight += math.log10(row["residual_out"]) > log_bound - 3
    assert tight  # not only because the bound is astronomic


# ---- taken from the library's blocks


def block_of(name: str, index: int = 0, *, padded: bool = False) -> tuple[Any, Any, Replay, Any]:
    model, inputs = zoo.build(name, dtype=torch.float64, padded=padded)
    structure = find_structure(model, inputs)
    replay = Replay(structure)
    one: dict[str, Any] = {key: value[-1:] for key, value in inputs.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        one["use_cache"] = False
    with measuring(model), replay:
        model(**one)
    edits = paper_variants(structure)[0].edits(structure)
    return model, structure.blocks[index], replay, edits


def by_head(weight: Tensor, heads: int = 4) -> Tensor:
    """(out, in) of a Linear as (H, in, d)."""
    return weight.T.unflatten(1, (heads, -1)).movedim(1, 0)


def same_products(found: Heads, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
    """Weights as (out, in) of Linears, up to what the theorem cannot see."""
    q, k, v, o = (w.detach() for w in (q, k, v, o))
    want = by_head(q) @ by_head(k).mT
    assert torch.allclose(found.w_q @ found.w_k.mT, want, rtol=0, atol=1e-10 * float(want.abs().max()))
    want = by_head(v) @ o.T.unflatten(0, (4, -1))
    assert torch.allclose(found.w_v @ found.w_o, want, rtol=0, atol=1e-10 * float(want.abs().max()))


def test_a_bert_layer_gives_its_weights() -> None:
    model, block, replay, edits = block_of("bert", 1)
    x = replay.stream(block)
    with measuring(model):
        tokens, heads, out = take_apart(attention_branch(replay, block, edits), Split.of(x))
    layer = model.encoder.layer[1].attention
    own = layer.self
    same_products(heads, own.query.weight, own.key.weight, own.value.weight, layer.output.dense.weight)
    assert torch.allclose(one_sample(tokens), x[0] - x[0].mean(0), atol=1e-13)
    with torch.no_grad():
        branch = layer.output.dense(own(x)[0])[0]
    assert torch.allclose(one_sample(out), branch - branch.mean(0), atol=1e-13)


def test_a_vit_layer_has_normed_tokens() -> None:
    model, block, replay, edits = block_of("vit", 2)
    layer = model.layers[2]
    normed: list[Tensor] = []
    handle = layer.layernorm_before.register_forward_hook(lambda m, a, y: normed.append(y))
    with measuring(model):
        layer(replay.stream(block))
        handle.remove()
        tokens, heads, _ = take_apart(attention_branch(replay, block, edits), Split.of(replay.stream(block)))
    weights = {
        key.split(".")[-2]: value for key, value in layer.attention.named_parameters() if value.ndim == 2
    }
    same_products(heads, *weights.values())
    assert torch.allclose(one_sample(tokens), normed[0][0] - normed[0][0].mean(0), atol=1e-12)


@pytest.mark.parametrize(
    "name", ["bert", "distilbert", "albert", "electra", "vit", "deit", "dinov2", "clip_vision"]
)
def test_the_bound_holds_for_blocks_of_the_library(name: str) -> None:
    model, first, replay, edits = block_of(name)
    structure = replay.structure
    bounds = Bounds(lambda layer: attention_branch(replay, structure.blocks[layer - 1], edits))

    def block(index: int) -> Callable[[Any], Any]:
        return lambda x: replay.run(structure.blocks[index], x, edits)

    with measuring(model):
        found = recursion([block(i) for i in range(structure.depth)], replay.stream(first), each=bounds)
    rows = bounds.rows()
    assert bounds.why == ""
    assert [row["layer"] for row in rows] == [row["layer"] for row in found.rows[1:]]
    for row in rows:
        assert row["residual_out"] > 0
        if row["spread"] <= SPREAD:
            assert row["residual_out"] <= row["bound_out"]


def test_padding_is_left_out_of_the_constants() -> None:
    model, block, replay, edits = block_of("bert", padded=True)
    x = replay.stream(block)
    mask = torch.ones(x.shape[1], dtype=torch.bool)
    mask[-3:] = False
    bounds = Bounds(lambda layer: attention_branch(replay, block, edits), mask)
    with measuring(model):
        bounds(1, Split.of(x))
    assert bounds.rows()[0]["residual_in"] == pytest.approx(
        float(composite(x[0, mask] - x[0, mask].mean(0))), rel=1e-12
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", "no row common to all queries"),
        ("llama", "no row common to all queries"),
        ("t5_encoder", "no row common to all queries"),
    ],
)
def test_what_the_theorem_does_not_cover_is_said(name: str, words: str) -> None:
    model, block, replay, edits = block_of(name)
    bounds = Bounds(lambda layer: attention_branch(replay, block, edits))
    with measuring(model):
        bounds(1, Split.of(replay.stream(block)))
    assert words in bounds.why
    assert bounds.why.startswith("block 1: ")
    assert bounds.rows() == []


W = [torch.randn(8, 8, generator=torch.Generator().manual_seed(i)).double() for i in range(4)]


def same(x: Any) -> Any:
    return x


def hand_made(
    q: Callable[[Any], Any] = same, after: Callable[[Any], Any] = same, before_k: Callable[[Any], Any] = same
) -> Callable[[Any], Any]:
    def branch(x: Any) -> Any:
        parts = [y.view(1, 5, 2, 4).transpose(1, 2) for y in (q(x @ W[0]), before_k(x) @ W[1], x @ W[2])]
        out = functional.scaled_dot_product_attention(*parts, scale=0.1).transpose(1, 2).reshape(1, 5, 8)
        return after(out @ W[3])

    return branch


@pytest.mark.parametrize(
    ("branch", "words"),
    [
        (hand_made(q=lambda q: functional.layer_norm(q, (8,))), "not linear in the same tokens"),
        (hand_made(before_k=lambda x: functional.layer_norm(x, (8,))), "not linear in the same tokens"),
        (hand_made(after=lambda y: functional.layer_norm(y, (8,))), "not linear in the tokens"),
        (lambda x: x @ W[0], "0 attentions"),
        (functional.gelu, "`gelu` has no rule"),
    ],
)
def test_other_attentions_are_refused(branch: Callable[[Any], Any], words: str) -> None:
    x = Split.of(torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(9)))
    with pytest.raises(RcProbeError, match=words):
        take_apart(branch, x)


def test_scales_are_part_of_the_weights() -> None:
    x = Split.of(torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(9)))
    _, heads, _ = take_apart(hand_made(q=lambda q: 2 * q, after=lambda y: y / 3), x)
    scores = (one_sample(x) @ heads.w_q) @ (one_sample(x) @ heads.w_k).mT / 2
    q, k = ((one_sample(x) @ w).view(5, 2, 4).movedim(1, 0) for w in W[:2])
    assert torch.allclose(scores, 0.2 * q @ k.mT, rtol=0, atol=1e-12)
    assert torch.allclose((heads.w_v @ heads.w_o).sum(0), W[2] @ W[3] / 3, rtol=0, atol=1e-12)


def test_a_block_without_attention_is_refused() -> None:
    _, block, replay, edits = block_of("bert")
    without = dataclasses.replace(block, junctions=block.junctions[1:])
    with pytest.raises(RcProbeError, match="block 1: it has 0 attention branches"):
        attention_branch(replay, without, edits)
