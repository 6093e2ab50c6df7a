"""Known answers of attention with a norm, against fixed points and matrices by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

import rc_probe.experiments
from rc_probe.experiments import ExperimentResult
from rc_probe.experiments.equilibria import EXPERIMENT, causal, equilibrium, layer, shear, sink


@pytest.fixture(scope="module")
def found() -> ExperimentResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EXPERIMENT, "quick", EXPERIMENT.quick.changed(starts=60, sinks=4, layers=150))
        return rc_probe.experiments.run("equilibria", quick=True, device="cpu")


def one_layer(x: np.ndarray, attention: np.ndarray, values: np.ndarray) -> np.ndarray:
    mixed = attention @ x @ values
    return mixed / np.sqrt((mixed**2).sum(1, keepdims=True))


def test_a_layer_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    assert shear(2, 3.0).tolist() == [[1, 3], [0, 1]]
    assert causal(3).tolist() == [[1, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]]
    assert sink(3).tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]]
    # token 2: the mean (−.5, .5) times [[1, 3], [0, 1]] is (−.5, −1)
    assert layer(x, causal(2), shear(2, 3.0), norm=False).tolist() == [[0, 1], [-0.5, -1]]
    length = math.hypot(0.5, 1)
    assert layer(x, causal(2), shear(2, 3.0))[1].tolist() == pytest.approx([-0.5 / length, -1 / length])


def test_two_tokens_end_at_the_fixed_points(found: ExperimentResult) -> None:
    """B = (−1/w, −√(1 − 1/w²)) for starts between the unstable point at 90° + asin(1/w) and 270°, else (0, 1)."""
    rows = found.tables["two_tokens"]
    for weight in (2.0, 4.0):
        mine = rows[(rows["weight"] == weight) & rows["norm"]]
        edge = 90 + math.degrees(math.asin(1 / weight))
        apart = mine["start"].between(edge, 270)
        wanted = np.where(apart, -math.sqrt(1 - weight**-2), 1.0)
        assert np.abs(mine["cosine"] - wanted).max() < 1e-12
        assert apart.mean() > 0.2
    assert -math.sqrt(1 - 2.0**-2) == pytest.approx(-0.8660, abs=1e-4)
    assert rows.loc[~rows["norm"], "cosine"].min() > 1 - 1e-12
    one = rows[
        (rows["weight"] == 1) & rows["norm"]
    ]  # both other fixed points are one, (−1, 0), reached at rate 1/t
    left = one["start"].between(180, 270)
    assert one.loc[~left, "cosine"].min() > 0.99 and one.loc[left, "cosine"].abs().max() < 0.05


@pytest.mark.parametrize(("tokens", "dim"), [(2, 2), (4, 4), (8, 8), (6, 3), (16, 8)])
def test_equilibria_of_every_rank_stay(found: ExperimentResult, tokens: int, dim: int) -> None:
    lower = np.tril(np.ones((tokens, tokens)))
    attention = lower / lower.sum(1, keepdims=True)
    values = np.eye(dim) + (tokens + 1) * np.diag(np.ones(dim - 1), 1)
    table = found.tables["equilibria"].query("seed == 0 and tokens == @tokens and dim == @dim")
    assert table["rank"].tolist() == table["wanted"].tolist() == list(range(1, min(tokens, dim) + 1))
    for rank, residual in zip(table["rank"], table["residual"], strict=True):
        x = equilibrium(tokens, dim, rank, tokens + 1).numpy()
        assert np.linalg.matrix_rank(x) == rank
        assert np.abs(np.linalg.norm(x, axis=1) - 1).max() < 1e-14
        off = np.abs(one_layer(x, attention, values) - x).max()
        assert off <= 1e-12 and residual == pytest.approx(off, abs=1e-14)


def test_growth_is_that_of_a_small_change(found: ExperimentResult) -> None:
    """At the fixed point B a change of token 2 along the circle is multiplied by 1 − √(1 − 1/w²); token 1 keeps its own."""
    rows = found.tables["equilibria"].query("seed == 0 and tokens == 2").set_index("rank")
    assert rows.loc[1, "weight"] == 3
    # rank 1: both at (0, 1), where (a, 1) becomes (a, 1 + 3a): nothing grows, nothing shrinks
    assert rows.loc[1, "growth"] == pytest.approx(1)
    assert rows.loc[2, "growth"] == pytest.approx(1)


def test_orthogonal_values_and_the_mask(found: ExperimentResult) -> None:
    last = found.tables["orthogonal"].groupby("mask")["residual"].last()
    first = found.tables["orthogonal"].query("layer == 0")["residual"]
    assert first.nunique() == 2  # of two seeds; the same start for every mask
    assert last["complete"] < 1e-14 and last["causal"] < 1e-14
    assert last["neighbours"] > 0.2


def test_sinks_keep_rank(found: ExperimentResult) -> None:
    ranks = found.tables["sinks"].groupby(["tokens", "weight"])["rank"].agg(["min", "max", "count"])
    assert ranks.loc[(64, 8.0)].tolist() == [16, 16, 8]
    assert ranks.loc[(16, 2.0), "min"] >= 2 and ranks.loc[(16, 2.0), "max"] <= 8


def test_the_page_draws_it(found: ExperimentResult) -> None:
    page = found.to_html()
    assert "with the norm cosines from −0.87 to 1.0" in page
    assert "without the norm cosines from 1.0 to 1.0" in page
    assert pd.isna(found.claims["holds"]).sum() == 0
