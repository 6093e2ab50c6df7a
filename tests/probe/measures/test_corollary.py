"""Corollary 3.2 and claim 3.1: Lipschitz constants that hold, bounds that hold, and what a model's MLPs do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support import zoo
from support.made_results import make_result
from torch import Tensor
from torch.nn import functional

from rc_probe.data.batches import Batch
from rc_probe.hooks.attach import Replay, find_structure
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.interventions.paper import paper_variants
from rc_probe.measures import TABLES
from rc_probe.measures.below_floor.below_float_floor import below_the_floor
from rc_probe.measures.below_floor.layer_weights import Heads
from rc_probe.measures.below_floor.mlp_lipschitz import ACTIVATIONS, lipschitz, mlp_of, slopes_of
from rc_probe.measures.below_floor.theorem_bound import SPREAD, layer_bound, unrolled


def composite(x: Tensor) -> float:
    size = x.abs().numpy()
    return float(np.sqrt(size.sum(0).max()) * np.sqrt(size.sum(1).max()))


def residual(x: Tensor) -> Tensor:
    return x - x.mean(0)


# ---- the constant


def test_constants_by_hand() -> None:
    """y + W₂ relu(W₁ y): G = |I + ½ W₂ W₁| + ½ |W₂| |W₁|."""
    inner, outer = torch.tensor([[2.0, 0.0], [0.0, -1.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    grown = np.array([[1 + 1 + 1, 0], [0, abs(1 - 1.5) + 1.5]])
    wanted = math.sqrt(grown.sum(0).max() * grown.sum(1).max())
    assert lipschitz(inner, outer, (0, 1)) == pytest.approx(wanted)
    assert lipschitz(inner, outer, (1, 1)) == pytest.approx(3), "a linear MLP: |I + W₂ W₁|"
    for name, least, most in (
        ("relu", 0, 1),
        ("gelu", -0.1290, 1.1290),
        ("silu", -0.0998, 1.0998),
        ("tanh", 0, 1),
    ):
        assert slopes_of(name) == pytest.approx((least, most), abs=1e-4)


def random_network(seed: int) -> Iterator[dict[str, Any]]:
    """Three layers with heads and an MLP of any size whose scores spread as the theorem allows: rows of `layer_bound`, with what
    the MLP adds."""
    g = torch.Generator().manual_seed(seed)
    name = list(ACTIVATIONS)[seed % len(ACTIVATIONS)]
    sizes = ((2, 9), (2, 9), (1, 4), (1, 5), (1, 12))
    T, D, H, d, F = (int(torch.randint(low, high, (1,), generator=g)) for low, high in sizes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).double()

    x = normal(T, D) * 2
    for _ in range(3):
        heads = Heads(normal(H, D, d), normal(H, D, d), normal(H, D, d), normal(H, d, D))
        spread = layer_bound(residual(x), heads)["spread"]
        heads = replace(heads, w_q=heads.w_q * min(1.0, SPREAD / max(spread, 1e-300)))
        row = layer_bound(residual(x), heads)
        scores = (x @ heads.w_q + normal(H, 1, d)) @ (x @ heads.w_k).mT / math.sqrt(d)
        y = (scores.softmax(-1) @ (x @ heads.w_v) @ heads.w_o).sum(0)
        inner, outer, bias = normal(F, D), normal(D, F), normal(F)
        both = torch.cat([y, y.mean(0, keepdim=True)])
        *z, center = both + ACTIVATIONS[name](both @ inner.T + bias) @ outer.T
        x = torch.stack(z)
        yield row | {
            "lipschitz": lipschitz(inner, outer, slopes_of(name)), "before": composite(residual(y)),
            "about_center": composite(x - center), "residual_out": composite(residual(x)), "floor": 1e-12 * composite(x),
        }  # fmt: skip
        if composite(residual(x)) == 0:
            return


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_nothing_is_violated_on_random_networks(start: int) -> None:
    tight = 0.0
    for seed in range(start, start + 50):
        rows = list(random_network(seed))
        for row in rows:
            assert row["about_center"] <= row["lipschitz"] * row["before"] * (1 + 1e-9) + row["floor"]
            assert row["residual_out"] <= 2 * row["lipschitz"] * row["bound_out"] + row["floor"]
            if row["before"] > 1e3 * row["floor"]:
                tight = max(tight, row["residual_out"] / (2 * row["lipschitz"] * row["before"]))
        based = [row | {"coefficient": 2 * row["lipschitz"] * row["coefficient"]} for row in rows]
        for row, bound in zip(based, unrolled(based), strict=True):
            assert bound is None or row["residual_out"] <= 10**bound * (1 + 1e-9) + row["floor"]
    assert tight > 0.1, "a constant far above all would prove nothing"


def test_claim_3_1_skips_keep_the_residual() -> None:
    """Heads that read some coordinates and write others: however small their values, the whole never has less than entered."""
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(6, 8, generator=g).double()
        first, size = x, 10.0 ** -(seed % 5)
        for _ in range(12):
            q, k, v = (torch.randn(8, 4, generator=g).double() for _ in range(3))
            written = torch.zeros(4, 8).double()
            written[:, 4:] = torch.randn(4, 4, generator=g).double()
            read = torch.cat([x[:, :4], torch.zeros(6, 4).double()], 1)
            x = x + size * ((read @ q) @ (read @ k).T / 2).softmax(-1) @ (read @ v) @ written
        kept = residual(first)[:, :4]
        assert torch.allclose(residual(x)[:, :4], kept) and composite(residual(x)) >= composite(kept) * (
            1 - 1e-12
        )


# ---- of the library's blocks


def replayed(name: str, **how: Any) -> tuple[Any, Any, Replay]:
    model, inputs = zoo.build(name, dtype=torch.float64, **how)
    structure = find_structure(model, inputs)
    replay = Replay(structure)
    with measuring(model), replay:
        model(**{key: value[:1] for key, value in inputs.items()})
    return model, structure, replay


def by_formula(inner: Tensor, outer: Tensor, slopes: tuple[float, float], *, skip: bool) -> np.ndarray:
    w1, w2 = inner.detach().numpy(), outer.detach().numpy()
    middle, half = sum(slopes) / 2, (slopes[1] - slopes[0]) / 2
    return np.abs(skip * np.eye(len(w2)) + middle * w2 @ w1) + half * np.abs(w2) @ np.abs(w1)


def test_a_post_norm_block() -> None:
    """BERT: the constant of its own weights; the gain, the residuals and the bound of a forward pass written by hand."""
    model, structure, replay = replayed("bert")
    with measuring(model):
        x = replay.stream(structure.blocks[0])
        found = below_the_floor(
            structure, Batch({"input_ids": torch.arange(10, 22)[None]}, None), "pretrained"
        )
        x = model.embeddings(torch.arange(10, 22)[None])
        for row, layer in zip(found.corollary, model.encoder.layer, strict=True):
            before = composite(residual(x[0])) / composite(x[0])
            attention = layer.attention
            y = attention.output.LayerNorm(attention.output.dense(attention.self(x)[0]))
            inner, outer = layer.intermediate.dense, layer.output.dense
            z = y + outer(functional.gelu(inner(y)))
            x = layer.output.LayerNorm(z)
            grown = by_formula(inner.weight, outer.weight, slopes_of("gelu"), skip=True)
            assert row["lipschitz"] == pytest.approx(
                math.sqrt(grown.sum(0).max() * grown.sum(1).max()), rel=1e-6
            )
            assert row["gain"] == pytest.approx(
                composite(residual(z[0])) / composite(residual(y[0])), rel=1e-6
            )
            assert row["residual"] == pytest.approx(composite(residual(x[0])) / composite(x[0]), rel=1e-6)
            assert row["rate"] == pytest.approx(row["residual"] / before, rel=1e-6)
            assert row["residual_out"] == pytest.approx(composite(residual(z[0])), rel=1e-6)
            assert row["base"] == pytest.approx(2 * row["lipschitz"] * row["coefficient"])
            assert row["bound_out"] == pytest.approx(row["base"] * row["residual_in"] ** 3, rel=1e-6)
            assert row["gain"] <= 2 * row["lipschitz"] and row["vacuous"] and row["reason"]
            assert row["spread"] > SPREAD or row["residual_out"] <= row["bound_out"]
    san = [row["residual"] for row in found.recursion]
    assert [row["rate_san"] for row in found.corollary] == pytest.approx(
        [b / a for a, b in itertools.pairwise(san)]
    )


def test_the_page_says_what_mlps_do() -> None:
    gains = {
        "lipschitz": [1030.0, 1219.0],
        "gain": [1.97, 2.95],
        "rate": [0.59, 0.86],
        "rate_san": [0.73, 0.42],
    }
    empty = dict.fromkeys(TABLES["corollary"].names)
    rows = [
        empty | {"weights": "pretrained", "layer": n + 1, "reason": ""} | {k: v[n] for k, v in gains.items()}
        for n in range(2)
    ]
    result = make_result(blocks=3, init=False, paths=False)
    result.tables["corollary"] = TABLES["corollary"].frame(rows)
    page = result.to_html()
    own = page[page.index("<h2>Below the float floor</h2>") :].partition("</section>")[0]
    wanted = (
        "Pretrained: with MLPs, in blocks 1 to 2, a block leaves 0.59 to 0.86 of the residual before it (pure attention 0.42 to 0.73); "
        "the MLPs alone multiply it by 2.0 to 3.0, and their weights allow λ = 1,030 to 1,219 (corollary 3.2).",
        'id="figure-corollary"', "what the MLP does to the residual, block 2: 2.95", 'id="table-corollary"',
    )  # fmt: skip
    for words in wanted:
        assert words in own, words


@pytest.mark.parametrize(("name", "says"), [("gpt2", ""), ("dinov2", ""), ("llama", "gated")])
def test_other_blocks(name: str, says: str) -> None:
    """A norm before the MLP, whose gain is measured; a LayerScale behind it, part of the weights; a gated MLP."""
    model, structure, replay = replayed(name)
    with measuring(model):
        edits = paper_variants(structure)[1].edits(structure)
        mlp, _ = mlp_of(replay, structure.blocks[0], edits, replay.stream(structure.blocks[0]))
    assert (says in mlp.why) and (mlp.constant is None) == bool(says) and mlp.gain > 0
    if name == "llama":
        return
    if name == "gpt2":
        own = model.h[0].mlp
        weights, slopes = (own.c_fc.weight.T, own.c_proj.weight.T), slopes_of("gelu_tanh")
    else:
        layer = model.encoder.layer[0] if hasattr(model, "encoder") else model.layers[0]
        scale = layer.layer_scale2.lambda1
        weights, slopes = (layer.mlp.fc1.weight, scale[:, None] * layer.mlp.fc2.weight), slopes_of("gelu")
    grown = by_formula(*weights, slopes, skip=False)
    assert mlp.entered is not None
    norms = [
        (residual(x).abs().sum(0).max(), residual(x).abs().sum(1).max()) for x in (mlp.entered, mlp.before)
    ]
    columns, rows = (float(a / b) for a, b in zip(*norms, strict=True))
    wanted = math.sqrt((1 + columns * grown.sum(1).max()) * (1 + rows * grown.sum(0).max()))
    assert mlp.constant == pytest.approx(wanted, rel=1e-5)
    assert mlp.gain <= 2 * mlp.constant


def test_what_the_corollary_does_not_cover_is_said() -> None:
    """Causal attention has no bound, its MLPs have constants; parallel MLPs are no f of the attention."""
    _, structure, _ = replayed("gpt2")
    inputs = Batch({"input_ids": torch.arange(10, 22)[None]}, None)
    found = below_the_floor(structure, inputs, "pretrained")
    assert [row["bound_out"] for row in found.corollary] == [None] * len(found.corollary) and found.corollary
    assert all(row["lipschitz"] > 1 for row in found.corollary)
    assert all("no row common" in row["reason"] and row["vacuous"] is None for row in found.corollary)
    _, structure, _ = replayed("gpt_neox")
    found = below_the_floor(structure, inputs, "pretrained")
    assert found.corollary == [] and any("runs beside its attention" in note for note in found.notes)
