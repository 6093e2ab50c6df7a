"""The columns of `paths` and `path_sources` that say what several numbers are together."""

from __future__ import annotations

import math

from torch import Tensor

from rc_probe.metrics.intervals import interval, student, within
from rc_probe.results.tables import Row


def over_samples(values: Tensor, metric: str, weights: Tensor | None = None) -> Row:
    """Mean over samples, standard deviation (ddof 1) of their values, and the 95 % interval of the mean.

    values (n,): one of each sample; weights (n,): how many predictions a score of a sample is about. The interval
    is NaN where there are too few samples.
    """
    low, high = interval(values.numpy(), metric, None if weights is None else weights.numpy())
    return {"mean": float(mean_of(values, metric, weights)), "std": _std(values), "low": low, "high": high}


def over_repeats(means: Tensor, metric: str) -> Row:
    """The same of independent estimates (repeats,), by Student's t: what varies is which paths were drawn."""
    low, high = within(student(means.numpy()), metric)
    return {"mean": float(means.mean()), "std": _std(means), "low": low, "high": high}


def mean_of(values: Tensor, metric: str, weights: Tensor | None) -> Tensor:
    """Over samples; that of a loss over their predictions."""
    if metric != "loss" or weights is None or weights.unique().numel() < 2:
        return values.mean()
    return (values * weights).sum() / weights.sum()


def _std(values: Tensor) -> float:
    return float(values.std()) if len(values) > 1 else math.nan
