"""Embeddings: IsoScore by the steps of its algorithm, RankMe, and all pairs one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from rc_probe.metrics.embeddings import BINS, coarse, pair_cosines, spectrum


def made(samples: int, dim: int, seed: int = 0) -> Any:
    """Directions of different strength around a mean that is not zero."""
    random = np.random.default_rng(seed)
    return random.normal(size=(samples, dim)) * np.linspace(2, 0.2, dim) + random.normal(size=dim)


def algorithm_1(points: Any) -> float:
    """Rudman et al. 2022, step by step: (samples, dim)."""
    n = points.shape[1]
    centred = points - points.mean(0)
    _, directions = np.linalg.eigh(np.cov(points.T))
    turned = centred @ directions  # step 2: into the principal components
    diagonal = np.diag(np.cov(turned.T))  # step 3
    normalised = np.sqrt(n) * diagonal / np.linalg.norm(diagonal)  # step 4
    defect = np.linalg.norm(normalised - np.ones(n)) / np.sqrt(2 * (n - np.sqrt(n)))  # step 5
    used = (n - defect**2 * (n - np.sqrt(n))) ** 2 / n**2  # step 6: the share of dimensions
    return float((n * used - 1) / (n - 1))  # step 7


@pytest.mark.parametrize(("samples", "dim"), [(200, 8), (12, 30), (9, 9), (50, 2)])
def test_isoscore_is_the_published_algorithm(samples: int, dim: int) -> None:
    points = made(samples, dim)
    found = spectrum(torch.tensor(points))
    assert found.isoscore == pytest.approx(algorithm_1(points), abs=1e-9)
    assert found.most_isoscore == (min(samples - 1, dim) - 1) / (dim - 1)
    shares = np.sort(np.linalg.eigvalsh(np.cov(points.T)))[::-1][: len(found.shares)]
    np.testing.assert_allclose(found.shares.numpy(), shares / shares.sum(), atol=1e-12)


def test_isoscore_counts_dimensions() -> None:
    """k of D axes, each used alike: (k − 1) / (D − 1); a line 0, all 1, whatever the scale and the mean."""
    for k in (1, 3, 6):
        axes = torch.cat([torch.eye(6)[:k], -torch.eye(6)[:k]]) * 1e-12 + 5e-9
        assert spectrum(axes).isoscore == pytest.approx((k - 1) / 5, abs=1e-6)
    simplex = torch.eye(5)  # five samples, as far apart as they can be: what so many reach
    found = spectrum(simplex)
    assert found.isoscore == pytest.approx(found.most_isoscore) == pytest.approx(3 / 4)


def test_rankme_is_that_of_all_embeddings_not_centred() -> None:
    points = made(40, 7)
    singular = np.linalg.svd(points, compute_uv=False)
    p = singular / singular.sum()
    found = spectrum(torch.tensor(points, dtype=torch.float32))
    assert found.rankme == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-6)
    assert found.most_rank == 7
    assert spectrum(torch.eye(4)).rankme == pytest.approx(4)
    assert spectrum(torch.zeros(4, 3)).rankme == 0


def test_what_varies_by_rounding_alone_does_not_vary() -> None:
    eps = torch.finfo(torch.float32).eps
    same = torch.ones(6, 20, dtype=torch.float64) + eps * torch.randn(6, 20, dtype=torch.float64) / 2
    found = spectrum(same, eps)
    assert len(found.shares) == 0 and np.isnan(found.isoscore)
    assert found.rankme == pytest.approx(1, abs=1e-4)
    assert len(spectrum(same).shares), "in float64 it does"


def test_pairs_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples 2 and 5 are the same text, and no pair; chunks of four."""
    monkeypatch.setattr("rc_probe.metrics.embeddings.CHUNK", 4)
    points, kinds = made(11, 5), [0, 1, 2, 3, 4, 2, 6, 7, 8, 9, 10]
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(11) for j in range(i) if kinds[i] != kinds[j]]
    cosines = {(i, j): float(unit[i] @ unit[j]) for i, j in pairs}
    found = pair_cosines(torch.tensor(points), kinds)
    assert found is not None and found.pairs == len(pairs) == 54
    values = np.array([*cosines.values()])
    assert (found.mean, found.std) == (pytest.approx(values.mean()), pytest.approx(values.std(ddof=1)))
    assert float(np.quantile(values, 0.95, method="inverted_cdf")) <= found.far + 1e-12
    assert (values < found.far).mean() >= 0.95
    assert found.far - float(np.quantile(values, 0.95, method="inverted_cdf")) <= 2 / BINS + 1e-12
    without = [np.mean([cosines[pair] for pair in pairs if left not in pair]) for left in range(11)]
    error = np.sqrt(10 / 11 * np.square(without - np.mean(without)).sum())
    half = stats.t.ppf(0.975, 10) * error
    assert found.interval == pytest.approx((values.mean() - half, values.mean() + half))
    bins = coarse(found.histogram, 100)
    assert sum(count for *_, count in bins) == 54 and bins[0][2] and bins[-1][2]
    assert all(count == ((values >= low) & (values < high)).sum() for low, high, count in bins)


def test_ends_of_the_range() -> None:
    same = pair_cosines(torch.ones(3, 4))
    assert same is not None and (same.mean, same.std, same.far) == (
        pytest.approx(1),
        pytest.approx(0, abs=1e-7),
        1,
    )
    opposite = pair_cosines(torch.tensor([[1.0], [-1.0]]))
    assert opposite is not None and opposite.mean == -1 and opposite.pairs == 1 and np.isnan(opposite.std)
    assert np.isnan(opposite.interval).all(), "no interval from fewer than 8 samples"
    assert pair_cosines(torch.ones(2, 4), [7, 7]) is None and pair_cosines(torch.ones(1, 4)) is None
