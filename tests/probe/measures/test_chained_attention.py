"""Chained attention against products by hand: in numpy, and in many digits where numpy has none left."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support import zoo
from support.attention import attached
from support.high_precision_san import composite, exact, product
from support.structures import with_branch
from torch import Tensor

import rc_probe.measures.chained_attention
from rc_probe import RcProbeError
from rc_probe.budget import Shape
from rc_probe.data.batches import Batch, batches
from rc_probe.data.samples import load_samples
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.structure.structure import Structure
from rc_probe.measures.attention import first_patterns
from rc_probe.measures.chained_attention import Chosen, affordable, chained_products
from rc_probe.measures.chained_products import (
    distances,
    draw_paths,
    first_eigenvector,
    identity,
    multiplied,
    single,
)
from rc_probe.models.load import Loaded
from rc_probe.registry import CHAIN_METRICS

Array = np.ndarray


def stochastic(rng: np.random.Generator, count: int, size: int, sharp: float = 2.0) -> Array:
    """Random matrices (count, size, size) whose rows are positive and sum to one."""
    scores = np.exp(sharp * rng.standard_normal((count, size, size)))
    return scores / scores.sum(-1, keepdims=True)


def norm(x: Array) -> float:
    return float(np.sqrt(np.linalg.norm(x, 1) * np.linalg.norm(x, np.inf)))


def by_hand(P: Array) -> dict[str, float]:
    u, s, vt = np.linalg.svd(P)
    pairs = itertools.product(P, P)
    return {
        "rank_one": norm(P - s[0] * np.outer(u[:, 0], vt[0])) / norm(P),
        "mean_row": norm(P - P.mean(0)) / norm(P),
        "dobrushin": max(abs(a - b).sum() for a, b in pairs) / 2,
    }


def of_product(factors: list[Array]) -> dict[str, float]:
    """What the module says of factors[-1] … factors[0], each (tokens, tokens)."""
    mean, deviation = identity(len(factors[0]))
    for factor in factors:
        mean, deviation = multiplied(torch.tensor(factor), mean, deviation)
    return {name: float(value) for name, value in distances(mean[None], deviation[None]).items()}


# ---- products and distances


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_distances_are_those_by_hand_with_later_layers_on_the_left(count: int) -> None:
    factors = list(stochastic(np.random.default_rng(count), count, 7)) or [np.eye(7)]
    P, reversed_order = np.eye(7), np.eye(7)
    for factor in factors:
        P, reversed_order = factor @ P, reversed_order @ factor
    found = of_product(factors)
    for name in CHAIN_METRICS if count else ["mean_row", "dobrushin"]:  # of 1 no rank-one part is the best
        assert found[name] == pytest.approx(by_hand(P)[name], rel=1e-9), name
        if count > 1:
            assert found[name] != pytest.approx(by_hand(reversed_order)[name], rel=1e-3), name


def test_order_matters() -> None:
    """First mix all tokens, then pick: equal rows. First pick, then mix: equal rows only of what was picked."""
    first, second = np.full((3, 3), 1 / 3), np.eye(3)[[1, 2, 0]]
    rough = np.array([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]])
    assert of_product([first, second])["dobrushin"] == pytest.approx(0, abs=1e-15)
    assert of_product([second, rough])["dobrushin"] == 1
    merge, shift = (
        np.array([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]]),
        np.array([[1.0, 0, 0], [1, 0, 0], [1, 0, 0]]),
    )
    half = np.array([[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0]])
    assert of_product([half, shift])["dobrushin"] == 0
    assert of_product([merge, half])["dobrushin"] == 0  # half reads rows 1 and 2 only, which merge made equal
    assert of_product([half, merge])["dobrushin"] == 1


def test_depth_leaves_every_digit() -> None:
    """Products of 25 nearly uniform patterns differ from rank one by 1e-50, and all of it is known."""
    factors = list(stochastic(np.random.default_rng(1), 25, 5, sharp=0.02))
    with mpmath.workdps(120):
        P = exact(torch.eye(5))
        for factor in factors:
            rows = exact(torch.tensor(factor))
            P = product([[v / mpmath.fsum(row) for v in row] for row in rows], P)
        U, S, V = mpmath.svd_r(mpmath.matrix(P))
        rest = [[P[i][j] - U[i, 0] * S[0] * V[0, j] for j in range(5)] for i in range(5)]
        mean = [mpmath.fsum(column) / 5 for column in zip(*P, strict=True)]
        centred = [[v - m for v, m in zip(row, mean, strict=True)] for row in P]
        spread = max(mpmath.fsum(abs(a - b) for a, b in zip(x, y, strict=True)) for x in P for y in P)
        wanted = {
            "rank_one": float(composite(rest) / composite(P)),
            "mean_row": float(composite(centred) / composite(P)),
            "dobrushin": float(spread / 2),
        }
    assert wanted["mean_row"] < 1e-45
    assert of_product(factors) == pytest.approx(wanted, rel=1e-8, abs=0)


def test_a_path_of_one_head_is_its_pattern() -> None:
    """As the product with the identity; rows that sum to one but for float32's rounding differ by no more than the pattern does."""
    A = torch.tensor(stochastic(np.random.default_rng(2), 1, 40, sharp=1e-6)[0]).float().double()
    A[3] *= 1 + 2e-7
    mean, deviation = single(A)
    wanted, rest = multiplied(A, *identity(40))
    np.testing.assert_allclose(mean, wanted, rtol=1e-12)
    np.testing.assert_allclose(deviation, rest, atol=1e-16)
    assert rest.abs().max() < 1e-7  # row 3 is as the others


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(1, 5), st.floats(0.1, 20))
def test_the_coefficient_certifies(seed: int, size: int, count: int, sharp: float) -> None:
    """Dobrushin: in [0, 1], of a product at most the product, and a bound on how far apart outputs are."""
    rng = np.random.default_rng(seed)
    factors = list(stochastic(rng, count, size, sharp))
    tau = of_product(factors)["dobrushin"]
    assert 0 <= tau <= 1
    assert tau <= np.prod([of_product([factor])["dobrushin"] for factor in factors]) * (1 + 1e-9) + 1e-12
    x = rng.standard_normal(size)
    y = x
    for factor in factors:
        y = factor @ y
    assert np.ptp(y) <= tau * np.ptp(x) * (1 + 1e-9) + 1e-12


def test_extremes() -> None:
    equal = np.tile([0.2, 0.3, 0.5], (3, 1))
    assert of_product([equal]) == pytest.approx(dict.fromkeys(CHAIN_METRICS, 0), abs=1e-15)
    turned = np.eye(3)[[1, 2, 0]]
    assert of_product([turned])["dobrushin"] == 1
    assert of_product([turned])["mean_row"] == pytest.approx(norm(np.eye(3) - 1 / 3))


# ---- paths


def test_paths_have_their_length_and_are_uniform() -> None:
    heads = [2, 1, 3]
    paths = draw_paths(heads, 4000, torch.Generator().manual_seed(0))
    assert paths.shape == (12000, 3)
    assert (paths > 0).sum(1).tolist() == [1] * 4000 + [2] * 4000 + [3] * 4000
    for layer, H in enumerate(heads):
        assert set(paths[:, layer].tolist()) == set(range(H + 1))
    for start, each in ((0, 1 / 3), (4000, 1 / 3)):  # sets of layers
        shares = Counter(tuple(row) for row in (paths[start : start + 4000] > 0).tolist())
        assert len(shares) == 3
        assert all(n / 4000 == pytest.approx(each, abs=0.03) for n in shares.values())
    full = Counter(tuple(row) for row in paths[8000:].tolist())
    assert len(full) == 6
    assert all(n / 4000 == pytest.approx(1 / 6, abs=0.03) for n in full.values())


def test_the_seed_decides_the_paths() -> None:
    one, same, other = (draw_paths([4] * 5, 9, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_path_that_is_drawn_again_is_not_multiplied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """L blocks of H heads have (H + 1)^L - 1 paths. Each draw counts: the statistics are those of all of them."""
    products: list[list[int]] = []
    module = rc_probe.measures.chained_attention
    real = module._product
    monkeypatch.setattr(module, "_product", lambda s, path: products.append(path) or real(s, path))  # type: ignore[func-returns-value]
    model, inputs, structure = attached("bert", padded=False, dtype=torch.float64)
    rows = chained_products(structure, [Batch(inputs, None)], Chosen(samples=1, draws=1000))
    assert len(products) == (model.config.num_attention_heads + 1) ** structure.depth - 1
    assert {row["count"] for row in rows} == {1000}


# ---- of models


def eager_attentions(model: Any, inputs: Any) -> list[Tensor]:
    eager = (
        type(model)
        ._from_config(copy.deepcopy(model.config), attn_implementation="eager", dtype=model.dtype)
        .eval()
    )
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        return [a.double() for a in eager(**inputs, output_attentions=True).attentions]


def expected(
    attentions: list[Tensor], mask: Tensor | None, draws: int, seed: int
) -> dict[tuple[int, str], list[float]]:
    """The values by length and metric, a path after the other, from the library's own eager attention."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[int, str], list[float]] = {}
    for sample in range(len(attentions[0])):
        T = attentions[0].shape[-1]
        real = np.arange(T) if mask is None else np.flatnonzero(mask[sample].numpy())
        for path in draw_paths([a.shape[1] for a in attentions], draws, generator).tolist():
            P = None
            for attention, head in zip(attentions, path, strict=True):
                if head:
                    A = attention[sample, head - 1].numpy()[real][..., real]
                    P = A if P is None else A @ P
            for name, value in by_hand(P).items():
                found.setdefault((sum(map(bool, path)), name), []).append(value)
    return found


def made(inputs: Any) -> Batch:
    mask = inputs.get("attention_mask")
    return Batch(inputs, None if mask is None or bool(mask.all()) else mask.bool())


MODELS = ["bert", "gpt2", "llama", "albert", "xlnet", "vit", "falcon"]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_eager_attention(name: str, padded: bool) -> None:
    text = zoo.ZOO[name].modality == "text"
    dtype = torch.float32 if name == "xlnet" else torch.float64  # whose relative positions are float32
    model, inputs, structure = attached(name, padded=padded and text, dtype=dtype)
    batch = made(inputs)
    assert (batch.mask is not None) == (padded and name != "vit")
    rows = chained_products(structure, [batch], Chosen(draws=6), seed=3)
    wanted = expected(eager_attentions(model, inputs), batch.mask, 6, 3)
    assert [(row["length"], row["metric"]) for row in rows] == [
        (k, name) for name in CHAIN_METRICS for k in range(1, structure.depth + 1)
    ]
    for row in rows:
        x = np.array(wanted[row["length"], row["metric"]])
        assert row["count"] == len(x) == 12
        low, median, high = np.quantile(x, [0.25, 0.5, 0.75])
        found = {key: row[key] for key in ("mean", "std", "low", "median", "high")}
        by_numpy = {"mean": x.mean(), "std": x.std(ddof=1), "low": low, "median": median, "high": high}
        assert found == pytest.approx(by_numpy, rel=1e-3 if name == "xlnet" else 1e-5, abs=1e-12)


def test_rows_do_not_depend_on_batches_or_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    _model, inputs, structure = attached("bert", batch=3, padded=True)
    whole = chained_products(structure, [made(inputs)], Chosen(3, 4))
    parts = []
    for i in range(3):
        length = int(inputs["attention_mask"][i].sum())
        parts.append(made({key: value[i : i + 1, :length] for key, value in inputs.items()}))
    monkeypatch.setattr(rc_probe.measures.chained_attention, "BYTES", 8 * 12 * 12 * 5)
    for made_otherwise in (parts, [made(inputs)], [*parts, parts[0]]):
        again = chained_products(structure, made_otherwise, Chosen(3, 4))
        for one, two in zip(copy.deepcopy(whole), again, strict=True):
            assert one.pop("metric") == two.pop("metric")
            assert one == pytest.approx(two, rel=1e-4, abs=1e-10)
    fewer = chained_products(structure, [made(inputs)], Chosen(2, 4))
    assert {row["count"] for row in whole} == {12}
    assert {row["count"] for row in fewer} == {8}


def test_each_sample_goes_through_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together where their patterns fit, else one after the other; rounding apart the same. Samples that are not used never."""
    _model, inputs, structure = attached("bert", batch=3, padded=True)
    calls: list[int] = []
    block = structure.module(structure.blocks[0])
    heads = sum(block.branches[0].heads for block in structure.blocks)
    kept = heads * 2 * 12 * 12 * 4  # of the two samples that are used, in float32
    monkeypatch.setattr(rc_probe.measures.chained_attention, "BYTES", 8 * 12 * 12 * 5)
    found = []
    for limit, passes in ((kept, [2]), (kept - 1, [1, 1])):
        monkeypatch.setattr(first_patterns, "KEPT", limit)
        calls.clear()
        with block.register_forward_pre_hook(lambda module, args: calls.append(len(args[0]))):
            found.append(chained_products(structure, [made(inputs)], Chosen(2, 4)))
        assert calls == passes
    for one, two in zip(*found, strict=True):
        assert one.pop("metric") == two.pop("metric")
        assert one == pytest.approx(two, rel=1e-4, abs=1e-10)


# ---- what is affordable

BASE = Shape(85_054_464, 12, 768, (12,) * 12, 128, 32)  # BERT-base on the bundled samples
HALF = Shape(357_898_112, 24, 896, (14,) * 24, 1024, 4)  # Qwen2-0.5B on four long texts


def products(chosen: Chosen, layers: int, tokens: int) -> float:
    """Multiply-adds of what is measured, each product by itself."""
    each = 2 * ((layers + 1) / 2 + 11) + 40 * chosen.spread
    return chosen.samples * chosen.draws * layers * each * tokens**3


def test_what_is_affordable() -> None:
    """By default everything on usual models; on longer texts less, always within one plain pass over the run's samples."""
    assert affordable(BASE, cut=True) == Chosen()
    assert affordable(replace(BASE, samples=1), cut=True) == Chosen(), "however few the samples"
    chosen = affordable(HALF, cut=True)
    assert chosen == Chosen(4, 12, 256, spread=False)
    all_samples = 4 * (357_898_112 * 1024 + 2 * 24 * 896 * 1024**2)
    own = 4 * (357_898_112 * 256 + 2 * 24 * 896 * 256**2)
    assert products(chosen, 24, 256) + own <= all_samples < products(replace(chosen, draws=25), 24, 256) + own
    assert all_samples < products(Chosen(4, 3, 512, spread=False), 24, 512)
    quarter = affordable(replace(HALF, half=True), cut=True)  # one pass counts as 7e11 at least
    assert quarter == Chosen(4, 3, 256, spread=False)
    assert products(Chosen(4, 3, spread=False), 24, 256) + own <= 7e11
    assert products(Chosen(4, 6, spread=False), 24, 256) + own > 7e11
    assert affordable(HALF, cut=False) is None, "nor are images cut"
    longer = affordable(replace(HALF, tokens=4096), cut=True)
    assert longer == Chosen(4, 12, 512, spread=False)


def test_the_first_tokens_of_a_sample() -> None:
    """As if the text were no longer; without the metric that is not asked for."""
    _model, inputs, structure = attached("llama")
    batch = made(inputs)
    short = made({name: x[:, :7] for name, x in inputs.items()})
    found = chained_products(structure, [batch], Chosen(2, 4, tokens=7, spread=False))
    wanted = chained_products(structure, [short], Chosen(2, 4))
    assert {row["metric"] for row in found} == {"rank_one", "mean_row"}
    assert found == [row for row in wanted if row["metric"] != "dobrushin"]


def test_the_head_of_the_model_does_not_run() -> None:
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**zoo.BERT)).eval()
    ids = torch.randint(10, 100, (2, 12))
    structure = find_structure(model, {"input_ids": ids})
    calls: list[Any] = []
    with model.cls.register_forward_pre_hook(lambda *_: calls.append(1)):
        rows = chained_products(structure, [Batch({"input_ids": ids}, None)], Chosen(draws=2))
    assert rows and not calls


def test_first_eigenvectors_are_those_of_numpy() -> None:
    """Also where the first two eigenvalues are close, or equal: then any vector of their plane."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    values = [
        [1, 0.5, 0.3, 0.2, 0],
        [7, 6.9999, 1, 0, 0],
        [1, 1e-9, 0, 0, 0],
        [3, 3, 1, 0, 0],
        [2e-300, 0, 0, 0, 0],
    ]
    squares = np.stack([rotation * v @ rotation.T for v in values])
    found = first_eigenvector(torch.from_numpy(squares)).numpy()[..., 0]
    for i, vector in enumerate(found):
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-12)
        inside = rotation[:, :2] if i == 3 else rotation[:, :1]
        assert np.linalg.norm(inside.T @ vector) == pytest.approx(1, abs=1e-10 if i != 1 else 1e-9)


def test_single_precision_is_enough() -> None:
    """Deep products too, of patterns that are as even as those of a model before training."""
    config = transformers.BertConfig(**zoo.BERT | {"num_hidden_layers": 8}, initializer_range=0.08)
    torch.manual_seed(0)
    model, ids = transformers.BertModel(config).eval(), torch.randint(10, 100, (2, 12))
    found = {}
    for dtype in (torch.float32, torch.float64):
        structure = find_structure(model.to(dtype), {"input_ids": ids})
        rows = chained_products(structure, [Batch({"input_ids": ids}, None)], Chosen(draws=5))
        found[dtype] = [row["mean"] for row in rows]
    assert min(found[torch.float64]) < 1e-10
    assert found[torch.float32] == pytest.approx(found[torch.float64], rel=1e-3, abs=0)


def test_the_model_and_the_random_state_stay() -> None:
    model, inputs, structure = attached("bert")
    model.train()
    state = torch.get_rng_state()
    one = chained_products(structure, [made(inputs)], Chosen(draws=3))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert one == chained_products(structure, [made(inputs)], Chosen(draws=3))
    assert one != chained_products(structure, [made(inputs)], Chosen(draws=3), seed=1)


def test_cross_attention_is_no_link() -> None:
    sizes = {
        "vocab_size": 100,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 32,
        "num_layers": 2,
        "num_decoder_layers": 3,
    }
    config = transformers.T5Config(**sizes, num_heads=4)
    torch.manual_seed(0)
    model = transformers.T5Model(config).eval().double()
    ids = torch.randint(5, 100, (2, 9))
    inputs = {"input_ids": ids[:, :7], "decoder_input_ids": ids}
    structure = find_structure(model, inputs, stack="decoder.block")
    rows = chained_products(structure, [Batch(inputs, None)], Chosen(draws=3))
    eager = (
        transformers.T5Model._from_config(copy.deepcopy(config), attn_implementation="eager").eval().double()
    )
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        attentions = list(eager(**inputs, output_attentions=True).decoder_attentions)
    wanted = expected(attentions, None, 3, 0)
    for row in rows:
        assert row["mean"] == pytest.approx(
            np.mean(wanted[row["length"], row["metric"]]), rel=1e-5, abs=1e-12
        )


def test_a_trained_model_forgets_with_depth(demo: Loaded) -> None:
    """The paper's figure of chained attention, on all-MiniLM: independently measured medians, on other texts."""
    structure = find_structure(demo.model)
    samples = load_samples(modality="text", samples=4)
    rows = chained_products(structure, batches(samples, demo), Chosen(draws=15))
    medians = {
        name: [row["median"] for row in rows if row["metric"] == name] for name in CHAIN_METRICS
    }  # by length 1 … 6
    for values in medians.values():
        assert values == sorted(values, reverse=True)
    wanted = [0.330, 0.134, 0.059, 0.029, 0.0091, 0.0053]
    assert [a / b for a, b in zip(medians["rank_one"], wanted, strict=True)] == pytest.approx(
        [1] * 6, abs=0.6
    )
    wanted = [0.94, 0.43, 0.17, 0.060, 0.028, 0.011]
    assert [a / b for a, b in zip(medians["mean_row"], wanted, strict=True)] == pytest.approx(
        [1] * 6, abs=0.6
    )


# ---- refused


def refused(structure: Structure, inputs: Any) -> str:
    with pytest.raises(RcProbeError) as caught:
        chained_products(structure, [made(inputs)], Chosen(draws=2))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_windows_are_refused() -> None:
    _model, inputs, structure = attached("swin")
    message = refused(structure, inputs)
    assert "block 1 " in message
    assert "not over all tokens of a sample" in message


def test_attention_of_several_operations_is_refused() -> None:
    _model, inputs, structure = attached("bert")
    ops = structure.blocks[1].branches[0].ops
    twice, never = (with_branch(structure, 1, 0, ops=given) for given in (ops * 2, ()))
    assert "block 2 (encoder.layer.1): its attention is of several operations" in refused(twice, inputs)
    assert "its attention has no heads that are known" in refused(never, inputs)


def test_sinks_are_refused() -> None:
    config = transformers.GptOssConfig(
        **zoo.LLAMA,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"] * 3,
    )
    torch.manual_seed(0)
    model = transformers.GptOssModel._from_config(config, attn_implementation="eager").eval()
    inputs = {"input_ids": torch.randint(10, 100, (2, 12))}
    assert "do not sum to one" in refused(find_structure(model, inputs), inputs)


def test_a_mask_that_does_not_hide_is_refused() -> None:
    """Padding that the model attends to: real tokens then see tokens that are none."""
    _model, inputs, structure = attached("bert")
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 8:] = False
    with pytest.raises(RcProbeError, match="do not sum to one"):
        chained_products(structure, [Batch(inputs, mask)], Chosen(draws=2))


def test_a_mask_of_other_tokens_is_refused() -> None:
    _model, inputs, structure = attached("vit")
    mask = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(RcProbeError, match="not over all tokens"):
        chained_products(structure, [Batch(inputs, mask)], Chosen(draws=2))


def test_models_without_attention_are_refused() -> None:
    config = transformers.ConvNextConfig(hidden_sizes=[12, 20], depths=[2, 2], num_stages=2, image_size=32)
    model = transformers.ConvNextModel(config).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    assert "no self-attention" in refused(find_structure(model, inputs), inputs)


def test_no_paths_are_refused() -> None:
    _model, inputs, structure = attached("bert")
    for how in (Chosen(samples=0), Chosen(draws=0)):
        with pytest.raises(RcProbeError, match="no path is drawn"):
            chained_products(structure, [made(inputs)], how)
    packed = Batch({"pixel_values": torch.zeros(5, 3), "grid": torch.zeros(2, 3)}, None)
    with pytest.raises(RcProbeError, match="do not tell how many samples"):
        chained_products(structure, [packed])
