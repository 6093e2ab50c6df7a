"""95 % intervals of what was measured on several samples or in several repeats.

    interval(values, "agreement")                     # (low, high): a share of each sample
    interval(values, "agreement", weights=ones)       # one 0/1 of each sample
    interval(losses, "loss", weights=tokens)          # the mean over tokens
    change_interval(losses, others, "loss", tokens)   # two versions on the same samples: of their difference

A sample is a cluster: its tokens are no independent observations, so every interval is over samples.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rc_probe.registry import METRICS, PATH_METRICS, REMOVAL_METRICS, Metric

Floats = NDArray[np.float64]
Interval = tuple[float, float]

LEVEL = 0.95
ENOUGH = 8  # samples; fewer have no interval
NO_INTERVAL = (np.nan, np.nan)
DRAWS, ENTRIES = 10_000, 2**24  # resamples, and sample counts in all of them together at most
SHARES = ("agreement", "accuracy")  # of a sample's predictions


def interval(values: ArrayLike, metric: str, weights: ArrayLike | None = None) -> Interval:
    """The 95 % interval of the mean of `metric` over samples; (NaN, NaN) for fewer than 8.

    values (n,): one of each sample; weights (n,): how many predictions each is the mean of. Losses are
    weighted by them (`student`); shares of a single prediction each are proportions (`wilson`); the rest is
    resampled (`bootstrap`). An interval never leaves the range that the registry gives the metric.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < ENOUGH:
        return NO_INTERVAL
    counts = None if weights is None else np.asarray(weights, dtype=np.float64)
    if metric == "loss":
        found = student(x, counts)
    elif metric in SHARES and counts is not None and bool((counts == 1).all()):
        found = wilson(int(x.sum()), len(x))
    else:
        found = bootstrap(x)
    return within(found, metric)


def change_interval(
    values: ArrayLike, others: ArrayLike, metric: str, weights: ArrayLike | None = None
) -> Interval:
    """The 95 % interval of the mean of values − others, (n,) of the same samples: paired. As `interval` otherwise.

    A single prediction each that `others` all have (agreement with itself) leaves a proportion of `values`.
    """
    x, y = (np.asarray(given, dtype=np.float64) for given in (values, others))
    if len(x) < ENOUGH:
        return NO_INTERVAL
    counts = None if weights is None else np.asarray(weights, dtype=np.float64)
    if metric == "loss":
        low, high = student(x - y, counts)
    elif metric in SHARES and counts is not None and bool((counts == 1).all() and (y == 1).all()):
        low, high = (end - 1 for end in wilson(int(x.sum()), len(x)))
    else:
        low, high = bootstrap(x - y)
    known = _known(metric)
    span = np.inf if known.low is None or known.high is None else known.high - known.low
    return float(max(low, -span)), float(min(high, span))


def within(found: Interval, metric: str) -> Interval:
    """An interval cut to the range of its metric."""
    known = _known(metric)
    low, high = np.clip(found, known.low, known.high)
    return float(low), float(high)


def _known(metric: str) -> Metric:
    return next(group[metric] for group in (PATH_METRICS, REMOVAL_METRICS, METRICS) if metric in group)


def wilson(hits: int, n: int) -> Interval:
    """Of a proportion: the p for which `hits` of n lie within z standard deviations of n p (Wilson 1927).

    15 of 16 gives 0.717 to 0.989; always within [0, 1], also where all or none hit.
    """
    z, p = _normal(), hits / n
    middle = p + z**2 / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return float((middle - half) / (1 + z**2 / n)), float((middle + half) / (1 + z**2 / n))


def student(values: ArrayLike, weights: ArrayLike | None = None) -> Interval:
    """Of a mean, by Student's t with n − 1 degrees of freedom; with weights, of the weighted mean.

    The weighted mean m = Σ wᵢ xᵢ / Σ wᵢ is a ratio of two sums over samples. Its variance is that of
    Σ wᵢ (xᵢ − m) to first order: n / (n − 1) Σ wᵢ² (xᵢ − m)² / (Σ wᵢ)² (Cochran 1977, "Sampling
    Techniques", chapter 6). Of 1, 2, 3, 4, 5 it gives 1.0368 to 4.9632; (NaN, NaN) for one value.
    """
    from scipy.special import stdtrit

    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    n = len(x)
    if n < 2:
        return NO_INTERVAL
    mean = float((w * x).sum() / w.sum())
    error = np.sqrt(n / (n - 1) * np.square(w * (x - mean)).sum()) / w.sum()
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2) * error)
    return mean - half, mean + half


def bootstrap(values: ArrayLike) -> Interval:
    """Of a mean: quantiles of the means of n values drawn with replacement; within the values' own range.

    Plain 2.5 and 97.5 % quantiles are too narrow for small n, by the ratio of z √(1 − 1/n) to Student's t; the
    ones taken are as far out as that needs (Hesterberg 2015, "What teachers should know about the bootstrap",
    the expanded percentile interval). The draws depend on n alone and the values are sorted first, so
    that the same samples give the same interval in any order and any batches.
    """
    from scipy.special import ndtr, stdtrit

    x = np.sort(np.asarray(values, dtype=np.float64))
    n = len(x)
    if n < 2 or not np.isfinite(x).all():
        return NO_INTERVAL
    out = float(ndtr(stdtrit(n - 1, (1 - LEVEL) / 2) * np.sqrt(n / (n - 1))))
    low, high = np.quantile(_drawn(n) @ (x - x[0]) / n, [out, 1 - out]) + x[0]
    return float(np.clip(low, x[0], x[-1])), float(np.clip(high, x[0], x[-1]))


@lru_cache(maxsize=2)
def _drawn(n: int) -> Floats:
    """How often each of n samples is in each resample, (draws, n): the same for every call."""
    draws = max(1000, min(DRAWS, ENTRIES // n))
    return np.random.default_rng(n).multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)


def _normal() -> float:
    from scipy.special import ndtri

    return float(ndtri((1 + LEVEL) / 2))
