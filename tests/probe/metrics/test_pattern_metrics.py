"""What an attention pattern does and what its mask promises, against loops by hand and a walk through the graph."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import patterns_by_hand as by_hand
from torch import Tensor

from rc_probe.metrics import pattern_metrics as metrics
from rc_probe.metrics.mask_graph import MaskGraph

AT = np.arange(32)
BACK = AT[:, None] - AT
MASKS = {
    "complete": BACK < 99, "causal": BACK >= 0, "window:1": abs(BACK) <= 1, "left:1": (BACK >= 0) & (BACK <= 1),
    "window:4": abs(BACK) <= 4, "left:4": (BACK >= 0) & (BACK <= 4), "window:8": abs(BACK) <= 8,
    "left:8": (BACK >= 0) & (BACK <= 8), "split": (AT[:, None] < 16) == (AT < 16),
}  # fmt: skip
NAMES = ("entropy", "least_weight")


def measured(pattern: Tensor, seen: Tensor) -> list[dict[str, float]]:
    """All metrics of each head."""
    most = metrics.received(pattern, seen).nan_to_num(-1).amax(1)
    found = {name: getattr(metrics, name)(pattern, seen) for name in NAMES}
    found |= {
        "sink": most,
        "dobrushin": metrics.dobrushin(pattern),
        "singular_gap": metrics.singular_gap(pattern),
    }
    found["logit_variance"], found["phase"] = metrics.logit_variance(pattern, seen)
    return [{name: float(values[head]) for name, values in found.items()} for head in range(pattern.shape[1])]


@pytest.mark.parametrize("mask", ["complete", "causal", "window:8", "left:4", "split"])
def test_metrics_are_those_by_hand(mask: str) -> None:
    rng, seen = np.random.default_rng(0), MASKS[mask]
    heads = [by_hand.stochastic(rng, seen, sharp) for sharp in (0.01, 1, 4)]
    pattern = torch.tensor(np.stack(heads))[None]
    for found, a in zip(measured(pattern, torch.tensor(seen)[None, None]), heads, strict=True):
        wanted = by_hand.head(a, seen)
        for name, value in found.items():
            if name in wanted:
                assert value == pytest.approx(wanted[name], rel=1e-6), name
            else:
                assert math.isnan(value) or value == -1, name
    assert ("phase" in wanted) == (mask != "left:4"), "a query that sees five keys says nothing of scores"


def test_values_that_are_known() -> None:
    every, eye = torch.ones(1, 1, 16, 16, dtype=torch.bool), torch.eye(16)[None, None]
    even = torch.full((1, 1, 16, 16), 1 / 16)
    one = torch.zeros(1, 1, 16, 16)
    one[..., 2] = 1
    for pattern, entropy, sink, apart in ((even, 1, 1 / 16, 0), (one, 0, 1, 0), (eye, 0, 0, 1)):
        assert float(metrics.entropy(pattern, every)) == pytest.approx(entropy, abs=1e-6)
        assert float(metrics.received(pattern, every).max()) == pytest.approx(sink), (
            "what a token gives itself is no sink"
        )
        assert float(metrics.dobrushin(pattern)) == pytest.approx(apart, abs=1e-6)
    assert float(metrics.logit_variance(even, every)[1]) == pytest.approx(0, abs=1e-5)
    assert float(metrics.singular_gap(eye)) == pytest.approx(1)
    assert float(metrics.singular_gap(one)) == pytest.approx(1 / torch.finfo(torch.float32).eps)


def test_gaussian_scores_cross_where_the_random_energy_model_freezes() -> None:
    """Scores of variance β² ln n on tokens of overlap p, from β and p; β_c = √(2 / (1 − p))."""
    rng, n = np.random.default_rng(0), 512
    for beta, p in ((0.5, 0.0), (2.0, 0.5), (3.0, 0.9)):
        shared, own = rng.standard_normal((64, 1)), rng.standard_normal((64, n))
        scores = beta * math.sqrt(math.log(n)) * (math.sqrt(p) * shared + math.sqrt(1 - p) * own)
        pattern = torch.tensor(scores).softmax(-1)[None, None]
        _, found = metrics.logit_variance(pattern, torch.ones_like(pattern, dtype=torch.bool))
        assert float(found) == pytest.approx(beta / math.sqrt(2 / (1 - p)), rel=0.02)


def test_a_learned_sink_and_windows() -> None:
    """What is left of a row counts for its entropy; windows are averaged, the largest coefficient counts."""
    rng, seen = np.random.default_rng(1), np.ones((10, 10), dtype=bool)
    one, two = by_hand.stochastic(rng, seen), by_hand.stochastic(rng, seen, 0.3)
    every = torch.ones(2, 1, 10, 10, dtype=torch.bool)
    both = measured(torch.tensor(np.stack([one, two * 0.4]))[:, None], every)[0]
    first, second = by_hand.head(one, seen), by_hand.head(two, seen)
    for name in ("entropy", "logit_variance"):
        assert both[name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-9)
    assert both["dobrushin"] == pytest.approx(max(first["dobrushin"], 0.4 * second["dobrushin"]))
    assert both["least_weight"] == min(one.min(), 0.4 * two.min())


# ---- the mask's graph

KNOWN = {  # centers and radius of 32 tokens
    "complete": (32, 1), "causal": (1, 1), "window:1": (32, 16), "left:1": (1, 31), "window:4": (32, 4),
    "left:4": (1, 8), "window:8": (32, 2), "left:8": (1, 4), "split": (0, None),
}  # fmt: skip


def test_graphs_of_known_masks() -> None:
    for name, (centers, radius) in KNOWN.items():
        found = MaskGraph.of(torch.tensor(MASKS[name]))
        assert (found.centers, found.radius, found.loops) == (centers, radius, True), name


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 9), st.floats(0.05, 0.9))
def test_graphs_are_those_of_a_walk(seed: int, tokens: int, density: float) -> None:
    seen = np.random.default_rng(seed).random((tokens, tokens)) < density
    found = MaskGraph.of(torch.tensor(seen))
    assert vars(found) == by_hand.graph(seen) | {"edges": pytest.approx(seen.mean())}


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 8), st.floats(0.1, 0.9), st.floats(0.0, 3), st.integers(1, 6))
def test_the_theorem_holds(seed: int, tokens: int, density: float, sharp: float, depth: int) -> None:
    """No product of random patterns on one random mask keeps more than is promised."""
    rng = np.random.default_rng(seed)
    seen = (rng.random((tokens, tokens)) < density) | np.eye(tokens, dtype=bool)
    patterns = [by_hand.stochastic(rng, seen, sharp) for _ in range(depth)]
    product, least = np.eye(tokens), min(a[seen].min() for a in patterns)
    for a in patterns:
        product = a @ product
    kept = by_hand.dobrushin(product)
    found = MaskGraph.of(torch.tensor(seen))
    assert kept <= found.bound(least, depth) + 1e-12
    if found.bound(least, depth) == 1:
        assert found.why_nothing(least, depth) or found.nearest * least**found.radius < 1e-16, (
            "it rounds to 1"
        )


def test_bounds_by_hand_and_where_they_say_nothing() -> None:
    graphs = {name: MaskGraph.of(torch.tensor(seen)) for name, seen in MASKS.items()}
    assert graphs["complete"].bound(0.01, 3) == pytest.approx((1 - 32 * 0.01) ** 3)
    assert graphs["causal"].bound(0.01, 3) == pytest.approx(0.99**3), "one center: looser"
    assert graphs["left:8"].bound(0.1, 9) == pytest.approx((1 - 1e-4) ** 2), "twice four blocks, and one"
    assert graphs["complete"].bound(1 / 32, 1) == 0
    for name, blocks, least, why in (
        ("left:8", 3, 0.1, "needs 4 blocks"), ("split", 9, 0.1, "no token reaches"), ("causal", 3, 0.0, "edge is 0"),
    ):  # fmt: skip
        assert graphs[name].bound(least, blocks) == 1
        assert why in graphs[name].why_nothing(least, blocks)
    blind = MASKS["complete"].copy()
    blind[3, 3] = False
    assert MaskGraph.of(torch.tensor(blind)).bound(0.01, 3) == 1
    assert "sees itself" in MaskGraph.of(torch.tensor(blind)).why_nothing(0.01, 3)


def test_the_product_orders_masks_where_the_radius_does_not() -> None:
    """left:4 has the larger radius and forgets faster than window:4; two blocks of tokens never meet."""
    rng, kept = np.random.default_rng(0), {}
    for name in ("window:4", "left:4", "split"):
        product = np.eye(32)
        for _ in range(24):
            product = by_hand.stochastic(rng, MASKS[name], 0.5) @ product
        kept[name] = float(metrics.dobrushin(torch.tensor(product)[None, None]))
    assert KNOWN["left:4"][1] > KNOWN["window:4"][1]  # type: ignore[operator]
    assert kept["left:4"] < kept["window:4"] / 5 and kept["split"] == 1
