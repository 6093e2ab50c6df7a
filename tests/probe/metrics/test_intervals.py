"""Intervals: by hand, by enumeration, and how often they hold what they are about."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from rc_probe.metrics.intervals import bootstrap, change_interval, interval, student, wilson, within


def test_wilson_by_hand() -> None:
    """15 of 16, and the ends: of 16 of 16 the lower end is n / (n + z²)."""
    assert wilson(15, 16) == pytest.approx((0.7167, 0.9889), abs=5e-5)
    z2 = 3.841458820694124
    assert wilson(16, 16) == pytest.approx((16 / (16 + z2), 1), abs=1e-12)
    assert wilson(0, 16) == pytest.approx((0, z2 / (16 + z2)), abs=1e-12)
    for hits in (0, 3, 10, 16):
        expected = stats.binomtest(hits, 16).proportion_ci(method="wilson")
        assert wilson(hits, 16) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_student_by_hand() -> None:
    assert student([1, 2, 3, 4, 5]) == pytest.approx((1.0368, 4.9632), abs=5e-5)
    assert student([1, 2, 3, 4, 5], [7, 7, 7, 7, 7]) == pytest.approx((1.0368, 4.9632), abs=5e-5)
    assert all(map(math.isnan, student([3.0])))


def test_a_weighted_mean_by_hand() -> None:
    """Values 1, 2, 4 of 1, 2 and 1 tokens: mean 9/4; Σ w² (x − m)² = 25/16 + 1/4 + 49/16 = 78/16, variance 3/2 · that / 16."""
    half = 4.302652729911275 * math.sqrt(1.5 * 78 / 16) / 4  # t with 2 degrees of freedom
    assert student([1, 2, 4], [1, 2, 1]) == pytest.approx((2.25 - half, 2.25 + half), rel=1e-9)


def enumerated(values: list[float], out: float) -> tuple[float, float]:
    """The quantiles `out` and 1 − `out` of the mean of n draws with replacement, over all nⁿ of them."""
    n, chances = len(values), []
    for drawn in itertools.combinations_with_replacement(range(n), n):
        ways = math.factorial(n) // math.prod(map(math.factorial, Counter(drawn).values()))
        chances.append((sum(values[i] for i in drawn) / n, ways / n**n))
    means, weights = (np.array(column) for column in zip(*sorted(chances), strict=True))
    below = weights.cumsum()
    assert len(means) == math.comb(2 * n - 1, n) and below[-1] == pytest.approx(1, abs=1e-12)
    return float(means[np.searchsorted(below, out)]), float(means[np.searchsorted(below, 1 - out)])


@pytest.mark.parametrize(
    "values", [[0.31, 0.42, 0.44, 0.58, 0.61, 0.77, 0.85, 0.93], [1, 1, 1, 1, 1, 0.9, 0.8, 0.2]]
)
def test_bootstrap_by_enumeration(values: list[float]) -> None:
    """All 6,435 different resamples of eight, at the quantile that makes up for so few: Φ(−2.3646 √(8/7)) = .00574."""
    assert bootstrap(values) == pytest.approx(enumerated(values, 0.00574), abs=0.008)


def test_the_interval_knows_no_order_and_no_state() -> None:
    values = np.random.default_rng(0).random(16)
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()
    found = bootstrap(values)
    assert np.random.get_state()[1].tolist() == before
    assert found == bootstrap(values[::-1]) == bootstrap(np.random.default_rng(3).permutation(values))


def test_no_interval_from_fewer_than_eight_samples() -> None:
    values = np.linspace(0.2, 0.9, 8)
    for metric in ("agreement", "loss", "norm_share"):
        assert all(map(math.isnan, interval(values[:7], metric, np.full(7, 5))))
        assert all(map(math.isfinite, interval(values, metric, np.full(8, 5))))


def test_which_interval_a_metric_has() -> None:
    """agreement .938 of 16 single predictions was 0.804 to 1.07; losses by tokens; other shares resampled."""
    ones = np.array([1.0] * 15 + [0.0])
    assert interval(ones, "agreement", np.ones(16)) == pytest.approx((0.7167, 0.9889), abs=5e-5)
    shares = np.array([1.0] * 14 + [0.9, 0.6])
    assert interval(shares, "agreement", np.full(16, 10)) == bootstrap(shares)
    assert interval(ones, "agreement", np.full(16, 10)) == bootstrap(ones)  # of ten tokens each
    tokens, losses = np.arange(1.0, 17), np.linspace(2, 4, 16) ** 2
    assert interval(losses, "loss", tokens) == student(losses, tokens)
    for metric in ("norm_share", "projection", "cosine_to_output", "residual"):
        assert interval(losses / 16, metric) == bootstrap(losses / 16)


def test_an_interval_stays_in_the_range_of_its_metric() -> None:
    assert within((0.804, 1.07), "agreement") == (0.804, 1)
    assert within((-0.3, 9.0), "loss") == (0, 9.0)
    assert within((-0.3, 9.0), "projection") == (-0.3, 9.0)
    assert within((-0.1, 2.2), "residual") == (0, 2)
    assert interval([0.0] * 15 + [8.0], "loss", np.ones(16))[0] == 0


@pytest.mark.parametrize("n", [8, 16])
def test_they_cover(n: int) -> None:
    """2,000 simulated runs each: shares (uniform), and losses whose tokens differ and weigh."""
    random = np.random.default_rng(0)
    held = {"share": 0, "loss": 0}
    for _ in range(2000):
        low, high = bootstrap(random.random(n))
        held["share"] += low <= 0.5 <= high
        tokens = random.integers(20, 120, n)
        low, high = student(3 + random.normal(size=n) * 0.5 + 0.002 * tokens, tokens)
        truth = 3 + 0.002 * float(np.square(np.arange(20.0, 120)).sum() / np.arange(20.0, 120).sum())
        held["loss"] += low <= truth <= high
    assert 0.93 < held["share"] / 2000 < 0.97
    assert 0.93 < held["loss"] / 2000 < 0.97


def test_two_versions_on_the_same_samples_are_paired() -> None:
    """Losses differ by a constant: the interval is that point, whatever the samples are. A change may be below 0."""
    losses, tokens = np.linspace(1, 9, 16), np.arange(1.0, 17.0)
    assert change_interval(losses - 0.5, losses, "loss", tokens) == pytest.approx((-0.5, -0.5), abs=1e-12)
    others = losses[::-1] ** 2
    assert change_interval(losses, others, "loss", tokens) == student(losses - others, tokens)
    hits, ones = np.array([1.0] * 15 + [0.0]), np.ones(16)
    assert change_interval(hits, ones, "agreement", ones) == pytest.approx((0.7167 - 1, 0.9889 - 1), abs=5e-5)
    assert change_interval(hits, hits[::-1], "accuracy", ones) == bootstrap(hits - hits[::-1])
    assert change_interval(losses / 9, losses / 18, "kl") == bootstrap(losses / 18)
    assert all(map(math.isnan, change_interval(losses[:7], others[:7], "loss", tokens[:7])))
