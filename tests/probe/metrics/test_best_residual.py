"""The solver's two bounds: right where the answer is known, and never on the wrong side of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from rc_probe.metrics.best_residual import argmin_residual


def composite(X: torch.Tensor) -> float:
    array = X.double().numpy()
    return float(np.sqrt(np.linalg.norm(array, 1)) * np.sqrt(np.linalg.norm(array, np.inf)))


def random(seed: int, T: int, D: int) -> torch.Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outliers(seed: int) -> torch.Tensor:
    """A huge token and a huge dimension, as in real streams."""
    X = random(seed, 24, 16) + 3 * random(seed + 1, 1, 16)
    X[:, 3] *= 20
    X[5] *= 50
    return X


def sink(seed: int) -> torch.Tensor:
    """One token far from all others: the best x for the rows lies half-way to it."""
    X = random(seed, 128, 16)
    X[5] *= 500
    return X


def line_minimum(X: np.ndarray, weight: float) -> float:
    """min over x of weight a(x) + (1 - weight) b(x), as a linear program over (x, U, a, b)."""
    T, D = X.shape
    size = D + T * D + 2
    rows, right = [], []
    for i in range(T):
        for j in range(D):
            for sign in (1, -1):  # sign (X_ij - x_j) <= U_ij
                row = np.zeros(size)
                row[j], row[D + i * D + j] = -sign, -1
                rows.append(row)
                right.append(-sign * X[i, j])
    for j in range(D):
        row = np.zeros(size)
        row[[D + i * D + j for i in range(T)]], row[-2] = 1, -1
        rows.append(row)
        right.append(0)
    for i in range(T):
        row = np.zeros(size)
        row[[D + i * D + j for j in range(D)]], row[-1] = 1, -1
        rows.append(row)
        right.append(0)
    cost = np.zeros(size)
    cost[-2:] = weight, 1 - weight
    bounds = [(None, None)] * D + [(0, None)] * (size - D)
    return float(linprog(cost, np.array(rows), np.array(right), bounds=bounds).fun)


@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 6))
@settings(max_examples=30)
def test_bounds_hold_for_any_budget(seed: int, T: int, D: int) -> None:
    """Lower and upper bound of many steps lie inside those of few, and no x goes below the lower one."""
    X = random(seed, T, D)
    rough, fine = argmin_residual(X, steps=1), argmin_residual(X, steps=150)
    assert rough.lower <= fine.upper and fine.lower <= rough.upper
    for result in (rough, fine):
        assert result.lower <= result.upper <= min(composite(X), composite(X - X.mean(0))) * (1 + 1e-12)
        assert composite(X - result.x) == pytest.approx(result.upper, rel=1e-12)
        for x in (X.median(0).values, (X.amax(0) + X.amin(0)) / 2, *X):
            assert composite(X - x) >= result.lower


@pytest.mark.parametrize(
    "X", [random(0, 32, 24), random(2, 40, 8) + 5 * random(3, 1, 8), outliers(4), sink(6)]
)
def test_gap_is_small(X: torch.Tensor) -> None:
    result = argmin_residual(X)
    assert 0 < result.upper - result.lower <= 0.01 * result.upper


@pytest.mark.parametrize("seed", range(3))
def test_against_linear_programs(seed: int) -> None:
    """Against exact minima of a, of b and of their mean, from an independent solver."""
    X = random(seed, 6, 5)
    a, b = line_minimum(X.numpy(), 1.0), line_minimum(X.numpy(), 0.0)
    result = argmin_residual(X)
    assert result.upper >= (a * b) ** 0.5 * (1 - 1e-9)
    assert result.lower >= (a * b) ** 0.5 * 0.995  # at least as good as the two exact minima
    middle = line_minimum(X.numpy() / composite(X), 0.5)
    best = (X - result.x).abs() / composite(X)
    assert 0.5 * (float(best.sum(0).max()) + float(best.sum(1).max())) >= middle * (1 - 1e-9)


def test_two_tokens_meet_in_the_middle() -> None:
    """Rows u and v: b >= ‖u - v‖₁ / 2, a >= max|u - v|, both attained at the mid-point."""
    X = torch.tensor([[3.0, 0.0, 1.0], [-1.0, 2.0, 1.0]])
    expected = (4 * 3) ** 0.5
    result = argmin_residual(X)
    assert result.upper == pytest.approx(expected, rel=1e-9)
    assert result.lower == pytest.approx(expected, rel=1e-3)


def test_one_column_is_the_median_or_the_middle() -> None:
    """D = 1: a = sum |X_i - x|, b = max |X_i - x|; a fine grid finds the best product."""
    X = torch.tensor([[0.0], [1.0], [1.5], [9.0]], dtype=torch.float64)
    grid = torch.linspace(0, 9, 90_001, dtype=torch.float64)
    size = (X - grid).abs()
    expected = float((size.sum(0) * size.amax(0)).min().sqrt())
    result = argmin_residual(X)
    assert result.lower <= expected <= result.upper * (1 + 1e-9)
    assert result.upper == pytest.approx(expected, rel=2e-3)


def test_scale_and_shift() -> None:
    """Powers of two change no digit; after others the steps are rounded anew, and each bound is certified by itself."""
    X = random(9, 12, 10)
    base = argmin_residual(X)
    for factor in (2.0**-66, 2.0**66):
        result = argmin_residual(X * factor)
        assert (result.lower, result.upper) == (base.lower * factor, base.upper * factor)
    for moved, factor in ((X * 1e-20, 1e-20), (X * 1e20, 1e20), (X + 3, 1.0)):
        result = argmin_residual(moved)
        assert result.upper == pytest.approx(base.upper * factor, rel=1e-9, abs=0)
        assert 0.99 * result.upper <= result.lower <= base.upper * factor


@pytest.mark.parametrize("X", [torch.ones(5, 4), torch.zeros(3, 2), torch.randn(1, 7)])
def test_equal_rows_are_zero(X: torch.Tensor) -> None:
    assert argmin_residual(X)[:2] == (0.0, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_shows(bad: float) -> None:
    X = random(0, 4, 3)
    X[1, 2] = bad
    assert all(np.isnan(argmin_residual(X)[:2]))
