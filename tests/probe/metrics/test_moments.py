"""Moments: numpy's mean and std, however the samples are cut."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rc_probe.metrics.layer_curves import Curves
from rc_probe.metrics.moments import Moments, pack, unpack
from rc_probe.metrics.stream_metrics import measure

finite = st.floats(-1e6, 1e6)


def state(moments: Moments) -> list[float]:
    return [float(moments.count), float(moments.mean), float(moments.m2)]


def close(a: list[float], b: list[float], scale: float) -> bool:
    mean = abs(a[1] - b[1]) <= 1e-12 * scale
    return a[0] == b[0] and mean and abs(a[2] - b[2]) <= 1e-10 * scale**2


@given(st.lists(st.lists(finite, max_size=5), max_size=6))
def test_add_equals_numpy_for_any_cut(batches: list[list[float]]) -> None:
    moments = Moments()
    for batch in batches:
        moments.add(torch.tensor(batch, dtype=torch.float64))
    values = np.array([v for batch in batches for v in batch])
    scale = max(1.0, float(np.abs(values).max(initial=0)))
    assert float(moments.count) == len(values)
    if len(values):
        assert math.isclose(float(moments.mean), values.mean(), abs_tol=1e-12 * scale)
    if len(values) > 1:
        assert math.isclose(float(moments.std), values.std(ddof=1), rel_tol=1e-9, abs_tol=1e-9 * scale)
    else:
        assert math.isnan(float(moments.std))


@given(st.lists(finite, max_size=6), st.lists(finite, max_size=6))
def test_merge_equals_add(left: list[float], right: list[float]) -> None:
    a, b, both = Moments(), Moments(), Moments()
    a.add(torch.tensor(left, dtype=torch.float64))
    b.add(torch.tensor(right, dtype=torch.float64))
    before = state(b)
    a.merge(b)
    both.add(torch.tensor(left + right, dtype=torch.float64))
    assert close(state(a), state(both), max([1.0, *map(abs, left + right)]))
    assert state(b) == before


def test_empty_batch_and_empty_merge_change_nothing() -> None:
    moments = Moments()
    moments.add(torch.tensor([3.0, 5.0]))
    before = state(moments)
    moments.add(torch.empty(0))
    moments.merge(Moments())
    assert state(moments) == before == [2.0, 4.0, 2.0]


def test_no_cancellation_far_from_zero() -> None:
    """Sums of squares would lose everything here: the spread is 1e-12 of the mean."""
    moments = Moments()
    for offset in (0.0, 1.0, 2.0):
        moments.add(torch.tensor([1e12 + offset], dtype=torch.float64))
    assert float(moments.std) == 1.0


def test_float32_values_are_summed_in_float64() -> None:
    moments = Moments()
    moments.add(torch.tensor([16777216.0, 1.0], dtype=torch.float32))  # 2^24 + 1 is not a float32
    assert moments.mean.dtype == torch.float64
    assert float(moments.mean) == 16777217 / 2


def test_nan_shows() -> None:
    moments = Moments()
    moments.add(torch.tensor([1.0, torch.nan]))
    moments.add(torch.tensor([1.0]))
    assert math.isnan(float(moments.mean)) and math.isnan(float(moments.std))


def test_further_dimensions_are_kept_apart() -> None:
    values = torch.arange(12.0).reshape(4, 3) ** 2
    moments = Moments()
    moments.add(values[:1])
    moments.add(values[1:])
    torch.testing.assert_close(moments.mean, values.double().mean(0))
    torch.testing.assert_close(moments.std, values.double().std(0))


def test_curves_are_the_statistics_of_each_metric_by_itself() -> None:
    """All metrics of a layer are summed in one go; the slow ones on the first few samples alone."""
    names, cheap = ["residual", "cosine", "norm", "effective_rank"], ["residual", "cosine", "norm"]
    generator = torch.Generator().manual_seed(0)
    streams = [torch.randn(n, 6, 5, generator=generator) * 3 + 1 for n in (4, 9, 1)]
    curves, other = Curves(names, few=5), Curves(names, few=0)
    one_by_one: dict[tuple[str, int], Moments] = {}
    for number, x in enumerate(streams):
        curves.samples = sum(len(y) for y in streams[:number])
        (curves if number < 2 else other).on_stream(1, x)
        found = measure(x, None, cheap)
        left = max(5 - curves.samples, 0)
        found |= measure(x[:left], None, ["effective_rank"]) if left else {}
        for name, pair in found.items():
            for i, values in enumerate(pair):
                one_by_one.setdefault((name, i), Moments()).add(values)
    assert len(curves.sums) == 2
    curves.merge(other)
    sent = unpack([pack(curves.each())])
    for name in names:
        for i, kept in enumerate((curves.values, curves.floors)):
            wanted = one_by_one[name, i]
            for moments in (kept[1, name], sent[1, name].part(i)):
                assert int(moments.count) == int(wanted.count) == (5 if name == "effective_rank" else 14)
                assert math.isclose(float(moments.mean), float(wanted.mean), rel_tol=1e-13)
                assert math.isclose(float(moments.m2), float(wanted.m2), rel_tol=1e-12, abs_tol=1e-20)
    rows = {row["metric"]: row for row in curves.rows()}
    assert rows["cosine"]["std"] == float(curves.values[1, "cosine"].std)
    assert rows["norm"]["floor"] == float(curves.floors[1, "norm"].mean)


def test_what_was_read_of_the_statistics_stays_when_more_comes() -> None:
    curves = Curves(["norm"])
    curves.on_stream(1, torch.ones(2, 3, 4))
    before, sent = curves.values[1, "norm"], pack(curves.each())
    curves.on_stream(1, torch.zeros(2, 3, 4))
    assert state(before) == [2.0, 2.0, 0.0]
    assert unpack([sent])[1, "norm"].mean[0] == 2.0
    assert state(curves.values[1, "norm"]) == [4.0, 1.0, 4.0]
