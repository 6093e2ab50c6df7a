"""The metrics: closed forms, numpy, and what must not change them."""

import math
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rc_probe.hooks.errors import RcProbeError
from rc_probe.metrics import pieces
from rc_probe.metrics import stream_metrics as metrics
from rc_probe.metrics.layer_curves import Curves
from rc_probe.metrics.norms import composite_norm
from rc_probe.metrics.stream_metrics import measure, useful_mask
from rc_probe.metrics.tokens import Tokens
from rc_probe.registry import METRICS, select

SIZES = ("residual", "residual_bulk", "residual_absolute")
CHEAP = [name for name, metric in METRICS.items() if metric.cost == "cheap"]
QUICK = [name for name, metric in METRICS.items() if metric.cost != "solver"]
EPS = torch.finfo(torch.float32).eps
seeds = st.integers(0, 10_000)


def stream(seed: int, B: int = 2, T: int = 7, D: int = 5, shift: float = 1.0) -> Tensor:
    """Random tokens with a common part (float64)."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(B, 1, D, dtype=torch.float64, generator=random)
    return torch.randn(B, T, D, dtype=torch.float64, generator=random) + shift * common


def values(x: Tensor, mask: Tensor | None = None, names: list[str] = QUICK) -> dict[str, Tensor]:
    return {name: value for name, (value, _) in measure(x, mask, names).items()}


def by_numpy(X: np.ndarray) -> dict[str, float]:
    """Each metric of one sample (T, D), the plain way."""
    R = X - X.mean(0)

    def size(Y: np.ndarray) -> float:
        return float(np.sqrt(np.linalg.norm(Y, 1) * np.linalg.norm(Y, np.inf)))

    def cosine(Y: np.ndarray, of: Any = lambda cosines: cosines) -> float:
        unit = Y / np.linalg.norm(Y, axis=1, keepdims=True)
        return float(of(unit @ unit.T)[~np.eye(len(Y), dtype=bool)].mean())

    def ranks(Y: np.ndarray) -> tuple[float, float]:
        s = np.linalg.svd(Y, compute_uv=False)
        p = s[s > 0] / s.sum()
        return float(np.exp(-(p * np.log(p)).sum())), float(
            np.linalg.norm(Y) ** 2 / np.linalg.norm(Y, 2) ** 2
        )

    norms = np.linalg.norm(X, axis=1)
    massive = (norms > 5 * np.median(norms)) & (np.median(norms) > 0)
    bulk = X[~massive]
    return {
        "residual": size(R) / size(X),
        "residual_bulk": size(bulk - bulk.mean(0)) / size(bulk),
        "cosine_bulk": cosine(bulk),
        "massive_share": float(massive.mean()),
        "residual_frobenius": float(np.linalg.norm(R) / np.linalg.norm(X)),
        "residual_absolute": size(R),
        "residual_frobenius_absolute": float(np.linalg.norm(R)),
        "cosine_absolute": cosine(X, np.abs),
        "cosine": cosine(X),
        "cosine_centred": cosine(R),
        "norm": float(np.linalg.norm(X, axis=1).mean()),
        **dict(zip(("effective_rank", "stable_rank"), ranks(X), strict=True)),
        **dict(zip(("effective_rank_bulk", "stable_rank_bulk"), ranks(bulk), strict=True)),
    }


@given(seeds, st.integers(2, 9), st.integers(1, 9))
def test_equal_to_numpy(seed: int, T: int, D: int) -> None:
    x = stream(seed, 2, T, D)
    found = values(x)
    for b, X in enumerate(x.numpy()):
        for name, expected in by_numpy(X).items():
            assert float(found[name][b]) == pytest.approx(expected, rel=1e-9, abs=1e-12), name


@given(seeds, st.integers(1, 6), st.sampled_from([math.nan, math.inf, 1e30, 0.0]))
def test_padding_does_not_enter(seed: int, pads: int, garbage: float) -> None:
    """Left, right or scattered padding with anything in it: the numbers of the tokens alone."""
    x = stream(seed).float()
    B, T, D = x.shape
    random = torch.Generator().manual_seed(seed)
    place = torch.rand(B, T + pads, generator=random).argsort(1)[:, :T].sort(1).values
    mask = torch.zeros(B, T + pads, dtype=torch.bool).scatter(1, place, True)
    padded = torch.full((B, T + pads, D), garbage)
    padded[mask] = x.reshape(-1, D)
    plain, hidden = measure(x, None, QUICK), measure(padded, mask, QUICK)
    for name in QUICK:
        for expected, got in zip(plain[name], hidden[name], strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-6, msg=name)
    assert bool(padded[~mask].isnan().all()) == math.isnan(garbage)  # the input is left alone


@given(seeds)
def test_a_mask_that_hides_nothing_changes_nothing(seed: int) -> None:
    x = stream(seed)
    wanted = values(x)
    for mask in (torch.ones(2, 7, dtype=torch.bool), torch.ones(2, 7, dtype=torch.int64)):
        for name, value in values(x, mask).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-14, msg=name)
        assert useful_mask(mask) is None
    assert useful_mask(None) is None
    hiding = torch.tensor([[1, 1], [1, 0]])
    assert torch.equal(useful_mask(hiding), hiding.bool())  # type: ignore[arg-type]


@given(seeds)
def test_samples_are_apart_and_tokens_have_no_order(seed: int) -> None:
    x = stream(seed, B=3)
    shuffled = x[:, torch.randperm(7, generator=torch.Generator().manual_seed(seed))]
    found, moved = values(x), values(shuffled)
    for name in QUICK:
        alone = torch.cat([values(x[b : b + 1], names=[name])[name] for b in range(3)])
        torch.testing.assert_close(alone, found[name], rtol=1e-12, atol=1e-13, msg=name)
        torch.testing.assert_close(moved[name], found[name], rtol=1e-11, atol=1e-12, msg=name)


@given(seeds, st.sampled_from([1e-9, 1e-3, 7.0, 1e9]))
def test_scale(seed: int, factor: float) -> None:
    """Norms scale with the stream, all else is unmoved."""
    x = stream(seed).float()
    for name, value in values(x * factor).items():
        unit = factor if METRICS[name].unit == "norm" else 1
        torch.testing.assert_close(value, values(x)[name] * unit, rtol=3e-6, atol=3e-6 * unit, msg=name)


@given(seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_low_precision_equals_float64_of_the_same_numbers(seed: int, dtype: torch.dtype) -> None:
    """Half precision is not summed in half precision."""
    x = stream(seed, T=40, D=30).to(dtype)
    for name, value in values(x).items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, values(x.double())[name], rtol=3e-6, atol=1e-6, msg=name)


@given(seeds, st.integers(1, 200), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]))
def test_equal_rows(seed: int, T: int, D: int, dtype: torch.dtype) -> None:
    """Exactly 0, however the mean is rounded: any T, no luck with powers of two."""
    x = stream(seed, 1, 1, D).to(dtype).expand(2, T, D)
    found = measure(x, None, QUICK)
    for name in ("residual", "residual_frobenius", "residual_absolute"):
        assert torch.equal(found[name][0], torch.zeros(2, dtype=torch.float64)), name
    if T > 1:
        assert found["cosine"][0].tolist() == pytest.approx([1, 1], abs=2e-6)
        assert (found["cosine_centred"][1] >= 2).all()  # nothing left to compare: all noise
    for name in ("effective_rank", "stable_rank"):
        torch.testing.assert_close(found[name][0], torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-9)


def test_nearly_equal_rows_keep_their_digits() -> None:
    """A float32 stream a few ulps from equal: the float64 residual of these very numbers, to six digits."""
    random = torch.Generator().manual_seed(0)
    x = (1 + EPS * torch.randint(-2, 3, (2, 100, 64), generator=random)) * torch.randn(
        1, 1, 64, generator=random
    )
    for name in ("residual", "residual_frobenius", "residual_absolute", "cosine_centred"):
        exact = values(x.double(), names=[name])[name]
        torch.testing.assert_close(values(x, names=[name])[name], exact, rtol=1e-5, atol=1e-6, msg=name)


def test_argmin_against_the_mean() -> None:
    """argmin in [0, 1]; mean <= 2 argmin; the certified bound below; padding out."""
    x = stream(3, B=4, T=12, D=10, shift=0.3)
    x[1, 2] *= 30
    x[2, :, 4] *= 30
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[3, 5:] = False
    x[3, 5:] = torch.nan
    found = values(x, mask, ["residual", "residual_argmin"])
    mean, high, low = found["residual"], found["residual_argmin"], found["residual_argmin_low"]
    assert (low > 0).all() and (low <= high).all() and (high <= 1).all()
    assert (high <= mean * (1 + 1e-12)).all() and (mean <= 2 * low).all()
    alone = values(x[3:, :5], None, ["residual_argmin"])["residual_argmin"]
    torch.testing.assert_close(high[3:], alone, rtol=1e-9, atol=0)


def test_the_mean_residual_can_exceed_one() -> None:
    """One huge coordinate per token, none shared: the mean spreads it over all rows."""
    x = torch.tensor([[[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [-7.0, 1.0]]])
    # mean (-1, 1): rows of R (2, 0) x 3, (-6, 0): l1 12, linf 6; X: l1 10, linf 8
    assert float(metrics.residual(x)) == pytest.approx(math.sqrt(72 / 80), rel=1e-6)
    x = torch.tensor([[[0.0, 1.0]] * 9 + [[0.0, -1.0]]])  # l1 of R 3.6, linf 1.8
    assert float(metrics.residual_absolute(x)) == pytest.approx(math.sqrt(3.6 * 1.8), rel=1e-6)
    x = torch.tensor([[[1.0]] + [[0.0]] * 3])  # l1 of R 1.5, linf .75; of X 1, 1
    assert float(metrics.residual(x)) == pytest.approx(math.sqrt(1.5 * 0.75), rel=1e-6) and 1.5 * 0.75 > 1


@pytest.mark.parametrize("n", [2, 3, 6])
def test_closed_forms(n: int) -> None:
    identity = torch.eye(n)[None] * 3
    found = {name: float(value) for name, value in values(identity).items()}
    assert found["effective_rank"] == pytest.approx(n) and found["stable_rank"] == pytest.approx(n)
    assert found["cosine"] == pytest.approx(0, abs=1e-7)
    assert found["cosine_centred"] == pytest.approx(-1 / (n - 1), abs=1e-6)  # a regular simplex
    assert found["norm"] == pytest.approx(3)
    assert found["residual"] == pytest.approx(2 * (1 - 1 / n), rel=1e-6)
    assert found["residual_frobenius"] == pytest.approx(math.sqrt(1 - 1 / n), rel=1e-6)
    opposite = torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])
    assert float(metrics.cosine(opposite)) == pytest.approx(-1)
    assert float(metrics.residual(opposite)) == pytest.approx(1)
    two = torch.diag(torch.tensor([3.0, 1.0, 0.0]))[None]  # p = 3/4, 1/4
    assert float(metrics.effective_rank(two)) == pytest.approx(4 / 3**0.75)
    assert float(metrics.stable_rank(two)) == pytest.approx(10 / 9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_numbers_show_and_stay_in_their_sample(bad: float) -> None:
    x = stream(0, B=2).float()
    clean = values(x)
    x[1, 2, 3] = bad
    for name, value in values(x).items():
        assert not bool(value[1].isfinite()), name
        torch.testing.assert_close(value[0], clean[name][0], rtol=1e-6, atol=1e-7, msg=name)
    assert all(math.isnan(v[1]) for v in values(x, names=["residual_argmin"]).values())


def test_edges() -> None:
    """Zero stream, zero token, one token, no token."""
    zero = measure(torch.zeros(1, 4, 3), None, QUICK)
    assert all(float(value) == 0 for value, _ in zero.values())
    assert float(zero["cosine"][1]) == float(zero["cosine_centred"][1]) == 2

    one_zero = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
    assert float(metrics.cosine(one_zero)) == pytest.approx(1 / 3)  # one pair of three

    one = values(torch.tensor([[[3.0, 4.0]]]))
    assert [float(one[n]) for n in ("residual", "residual_frobenius", "residual_absolute")] == [0, 0, 0]
    assert float(one["norm"]) == pytest.approx(5)
    assert float(one["effective_rank"]) == pytest.approx(1) and float(one["stable_rank"]) == pytest.approx(1)
    assert math.isnan(one["cosine"]) and math.isnan(one["cosine_centred"])

    mask = torch.tensor([[True, True], [False, False]])
    for name, value in values(torch.randn(2, 2, 3), mask, list(METRICS)).items():
        assert math.isfinite(value[0]) and math.isnan(value[1]), name


@pytest.mark.parametrize("collapse", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("name", QUICK)
def test_floor_covers_rounding_noise(name: str, collapse: float) -> None:
    """Noise of one eps per entry moves a metric by less than its floor, and the floor is some eps."""
    x = stream(1, B=6, T=24, D=32)
    x = (x.mean(1, keepdim=True) + collapse * (x - x.mean(1, keepdim=True))).float().double()
    random = torch.Generator().manual_seed(2)
    noisy = x * (1 + EPS * (2 * torch.rand(x.shape, dtype=x.dtype, generator=random) - 1))
    floor = measure(x.float(), None, [name])[name][1]
    moved = (values(noisy, names=[name])[name] - values(x, names=[name])[name]).abs()
    assert (moved <= floor).all()
    if collapse == 1:
        assert (floor <= 200 * EPS * values(x, names=[name])[name].clamp(min=1)).all()


@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.float64, 2**-52), (torch.float32, 2**-23), (torch.bfloat16, 2**-7)]
)
def test_floor_is_of_the_streams_own_dtype(dtype: torch.dtype, eps: float) -> None:
    x = stream(0).to(dtype)
    found = measure(x, None, ["residual", "residual_absolute", "cosine"])
    assert torch.equal(found["residual"][1], torch.full((2,), 4 * eps, dtype=torch.float64))
    size = composite_norm(x.double())
    torch.testing.assert_close(found["residual_absolute"][1], 4 * eps * size, rtol=1e-6, atol=0)
    assert found["cosine"][1].tolist() == pytest.approx([8 * eps] * 2, rel=1e-6)


def test_composite_norm_does_not_underflow() -> None:
    x = torch.full((1, 2, 2), 1e-200, dtype=torch.float64)
    assert float(composite_norm(x)) == pytest.approx(2e-200, rel=1e-12, abs=0)


def test_measure_shares_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean is taken away once for all metrics that need it."""
    calls: list[Tensor] = []
    real = pieces.Piece.centred
    monkeypatch.setattr(pieces.Piece, "centred", lambda piece, out: calls.append(out) or real(piece, out))  # type: ignore[func-returns-value]
    measure(stream(0), None, CHEAP)
    assert len(calls) == 1


def test_the_thread_count_is_given_back() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        measure(stream(0), None, CHEAP)
        with pytest.raises(RcProbeError):
            measure(torch.zeros(1), None, CHEAP)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_no_graph_and_no_autocast() -> None:
    x = stream(0).float().requires_grad_()
    plain = values(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = values(x)
    for name in QUICK:
        assert not plain[name].requires_grad
        assert torch.equal(plain[name], cast[name]), name


def test_non_contiguous_stream() -> None:
    """Time-first models hand over a transposed view."""
    x = stream(0)
    view = x.transpose(0, 1).contiguous().transpose(0, 1)
    for name, value in values(view).items():
        torch.testing.assert_close(value, values(x)[name], rtol=1e-12, atol=1e-13, msg=name)


def test_registry_and_recipes_agree() -> None:
    assert set(metrics._READERS) == set(METRICS)
    x = stream(0)
    for name, value in values(x, names=list(METRICS)).items():
        assert torch.equal(getattr(metrics, name)(x), value)
        low, high = METRICS[name].low, METRICS[name].high
        assert low is None or (value >= low).all()
        assert high is None or (value <= high).all()


def test_select() -> None:
    assert select() == [
        name for name in QUICK if name not in {"residual_frobenius_absolute", "cosine_absolute"}
    ]
    assert select(["cosine", "residual"]) == ["residual", "cosine"]
    assert select(["residual_argmin"]) == ["residual_argmin", "residual_argmin_low"]
    with pytest.raises(RcProbeError, match=r"'cosin'.*Did you mean 'cosine'"):
        select(["cosin"])
    with pytest.raises(RcProbeError, match="Choose from residual,"):
        select(["qqq"])


@pytest.mark.parametrize(
    ("x", "mask"),
    [
        (torch.zeros(3, 4), None),
        (torch.zeros(1, 2, 3, dtype=torch.long), None),
        (torch.zeros(1, 2, 3), torch.ones(1, 3)),
    ],
)
def test_wrong_shapes_are_refused(x: Tensor, mask: Tensor | None) -> None:
    with pytest.raises(RcProbeError, match="shape"):
        Tokens(x, mask)


# ---- massive tokens


def with_massive(x: Tensor, factor: float, *places: int) -> Tensor:
    """x with tokens made longer, in every sample."""
    y = x.clone()
    y[:, list(places)] *= factor
    return y


@given(seeds, st.integers(5, 9), st.sampled_from([20.0, 1e3, 1e6]))
def test_the_bulk_by_numpy(seed: int, T: int, factor: float) -> None:
    x = with_massive(stream(seed, 2, T), factor, 1)
    for b, X in enumerate(x.numpy()):
        wanted, found = by_numpy(X), values(x)
        hypothesis.assume(wanted["massive_share"] == 1 / T)  # a token may have been small before
        for name in QUICK:
            if name in wanted:
                assert float(found[name][b]) == pytest.approx(wanted[name], rel=1e-7), name


@given(seeds)
def test_without_massive_tokens_the_bulk_is_everything_bitwise(seed: int) -> None:
    x = stream(seed).float()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    for given_mask in (None, mask):
        found = values(x, given_mask)
        for name in ("residual", "cosine", "effective_rank", "stable_rank"):
            assert torch.equal(found[name], found[f"{name}_bulk"]), name
        tokens = Tokens(x, given_mask)
        none = torch.zeros(2, 7, dtype=torch.bool, device="cpu")
        real = torch.ones_like(none) if given_mask is None else given_mask
        other = Tokens(
            x, real & ~none
        )  # what a GPU computes, where nobody looks whether there are massive ones
        assert torch.equal(metrics.residual_of(other)[0], metrics.residual_of(tokens)[0])


def test_the_bulk_by_hand() -> None:
    """Norms 1, 2, 3, 4 and m: the median is 3 with m, so m = 15 stays and 15.001 goes; padding has no say."""
    rows = torch.eye(6, dtype=torch.float64)[:5] * torch.tensor([1.0, 2, 3, 4, 15])[:, None]
    share = lambda x, mask=None: float(measure(x[None], mask, ["massive_share"])["massive_share"][0])  # noqa: E731
    assert share(rows) == 0
    rows[4] *= 1.0001
    assert share(rows) == 0.2
    padded = torch.cat([rows, torch.full((3, 6), 99.0, dtype=torch.float64)])
    assert share(padded, torch.tensor([[True] * 5 + [False] * 3])) == 0.2
    # Of four norms the median is between the two middle ones: 1, 1, 3, m gives 2, so 10 stays.
    rows = torch.eye(4, dtype=torch.float64) * torch.tensor([1.0, 1, 3, 10])[:, None]
    assert share(rows) == 0
    rows[3] *= 1.0001
    assert share(rows) == 0.25
    # Two tokens are never massive, and where the median is 0 none is.
    assert share(torch.tensor([[1.0, 0], [0, 1e9]])) == 0
    assert share(torch.tensor([[0.0, 0], [0, 0], [0, 0], [0, 1e9]])) == 0


def test_equal_tokens_behind_a_massive_one_are_collapsed() -> None:
    """127 equal tokens and one of norm 3000: the paper's residual says apart, that of the bulk 0."""
    x = torch.full((1, 128, 16), 1e-3)
    x[0, 5, 3] = 3000.0
    found = values(x, names=["residual", "residual_bulk", "residual_frobenius", "cosine_bulk"])
    assert float(found["residual"]) > 1.2 and float(found["residual_frobenius"]) > 0.9
    assert float(found["residual_bulk"]) == 0 and float(found["cosine_bulk"]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 3])
def test_a_token_that_is_not_finite_is_never_left_out(bad: float, place: int) -> None:
    x = stream(0).float()
    x[1, place, 2] = bad
    for name in ("residual_bulk", "cosine_bulk", "effective_rank_bulk"):
        one = measure(x, None, [name])[name][0]
        assert one[0].isfinite() and not one[1].isfinite(), name


@given(seeds, st.sampled_from([1e-30, 1e-25, 1e20, 1e30]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_extreme_scales(seed: int, scale: float, dtype: torch.dtype) -> None:
    """Squares of such numbers leave float32: the metrics do not."""
    x = (stream(seed, shift=0.3) * scale).to(dtype)
    found = values(x)
    for b, X in enumerate(x.double().numpy()):
        for name, expected in by_numpy(X).items():
            assert float(found[name][b]) == pytest.approx(expected, rel=1e-4, abs=3e-6), name


def test_rows_of_one_token_are_no_samples() -> None:
    """Of a row of four tokens and a row of one, the row of four alone is counted, in every metric."""
    x = stream(3, 2, 4).float()
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    both, alone = Curves(CHEAP), Curves(CHEAP)
    both.mask, alone.mask = mask, None
    both.on_stream(0, x)
    alone.on_stream(0, x[:1])
    for one, other in zip(both.rows(), alone.rows(), strict=True):
        assert one["count"] == other["count"] == 1
        assert one["mean"] == pytest.approx(other["mean"], rel=1e-12), one["metric"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("cached", [0, 100, 2**19])  # one sample at a time, two, all that are alike
def test_samples_of_large_streams_are_measured_a_few_at_a_time(
    dtype: torch.dtype, scale: float, turned: bool, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the batch at once; and bitwise as each without its padding.

    With padding before, behind and between, a massive token, a zero one, equal rows and what is not finite.
    """
    torch.manual_seed(0)
    x = torch.randn(5, 7, 6).to(dtype) * scale
    x[1, 3] *= 200
    x[1, 5] = 0
    x[2] = x[2, :1]
    x[3, 2, 1] = math.inf
    if turned:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)  # as of models that put the tokens first
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[0, 4:] = mask[1, :2] = mask[2, 3] = mask[4] = False
    names = [name for name in METRICS if METRICS[name].cost != "solver"]
    for real in (None, mask):
        whole = measure(x, real, names)
        with monkeypatch.context() as patch:
            patch.setattr(pieces, "CACHED", cached)
            patch.setattr(pieces, "DEAR", 0)
            apart = measure(x, real, names)
            alone = [
                measure(one[None] if real is None else one[real[i]][None], None, names)
                for i, one in enumerate(x[:4])
            ]
        for name in names:
            for k in (0, 1):
                values = apart[name][k]
                assert values.nan_to_num(-1).tolist() == pytest.approx(
                    whole[name][k].nan_to_num(-1).tolist(),
                    rel=1e-6 if dtype != torch.float64 else 1e-12,
                    abs=1e-6,
                ), name
                for i, one in enumerate(alone if name in SIZES else ()):
                    assert torch.equal(values[i].nan_to_num(-1), one[name][k][0].nan_to_num(-1)), (name, i)


def test_the_bulk_of_samples_that_are_measured_apart_may_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their first token samples are shorter, so that more of them make a piece; or they are alike only then."""
    torch.manual_seed(0)
    x = torch.randn(4, 9, 8)
    x[:, 0] *= 1e4
    padded = torch.ones(4, 9, dtype=torch.bool)
    padded[1::2, 0] = False
    names = [name for name in CHEAP if "bulk" not in name]
    for cached in (130, 2**19):  # of samples of 72 and of 64 entries
        for real in (None, padded):
            with monkeypatch.context() as patch:
                patch.setattr(pieces, "CACHED", cached)
                patch.setattr(pieces, "DEAR", 0)
                bulk = measure(x, real, ["residual_bulk", "cosine_bulk"])
                rest = measure(x[:, 1:].contiguous(), None, names)
                torch.testing.assert_close(bulk["residual_bulk"][0], rest["residual"][0], rtol=0, atol=0)
                torch.testing.assert_close(bulk["cosine_bulk"][0], rest["cosine"][0], rtol=1e-6, atol=0)
    large = torch.randn(4, 257, 1024)  # images of ViT-L: three go together, and four without the class token
    large[:, 0] *= 1e4
    values = measure(large, None, ["residual_bulk"])["residual_bulk"][0]
    assert torch.equal(values, measure(large[:, 1:].contiguous(), None, ["residual"])["residual"][0])


@pytest.mark.parametrize("tokens", range(1, 8))
@pytest.mark.parametrize("odd", [None, math.nan, math.inf])
def test_the_median_is_the_mean_of_the_two_middle_norms(tokens: int, odd: float | None) -> None:
    torch.manual_seed(tokens)
    lengths = torch.rand(3, tokens, dtype=torch.float64).mul(8).round() + 1  # with ties
    x = lengths[..., None] * torch.tensor([0.6, 0.8], dtype=torch.float64)
    if odd is not None:
        x[1, 0, 1] = odd
    found = Tokens(x).median
    norms = np.linalg.norm(x.numpy(), axis=2)
    norms[~np.isfinite(norms)] = np.inf  # as sorting has it: behind all others
    ordered = np.sort(norms, 1)[:, (tokens - 1) // 2 : tokens // 2 + 1].mean(1)
    known = np.isfinite(ordered)
    np.testing.assert_allclose(found[known], ordered[known], rtol=1e-15)
    assert not found[~known].isfinite().any()


def test_a_stream_without_tokens_is_refused() -> None:
    for name in METRICS:
        with pytest.raises(RcProbeError, match="has no tokens"):
            measure(torch.zeros(2, 0, 8), None, [name])


@pytest.mark.parametrize(
    ("samples", "tokens", "dim"), [(7, 128, 384), (9, 33, 510), (3, 64, 2050), (2, 300, 2048)]
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_sample_is_bitwise_what_it_is_alone(samples: int, tokens: int, dim: int, turned: bool) -> None:
    """At the sizes at which samples go together, alike or not, with a massive token at the start or within."""
    torch.manual_seed(0)
    x = torch.randn(samples, tokens, dim)
    x[1:, 0] *= 200
    x[-1, 5] *= 300
    if turned:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    mask = torch.ones(samples, tokens, dtype=torch.bool)
    mask[0, 20:] = False
    names = ["residual", "residual_bulk", "residual_absolute", "norm", "massive_share"]
    for real in (None, mask):
        together = measure(x, real, names)
        for i, one in enumerate(x):
            alone = measure(one[None] if real is None else one[real[i]][None], None, names)
            for name in names:
                assert float(together[name][0][i]) == float(alone[name][0]), (name, i)


@pytest.mark.parametrize(
    ("size", "quick"), [(1.0, True), (1e-11, True), (1e-13, False), (1e17, True), (1e19, False)]
)
def test_lengths_are_as_exact_as_in_float64(
    size: float, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 2048) * size / 2048**0.5
    dtypes: list[torch.dtype | None] = []
    norm = torch.linalg.vector_norm
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.linalg,
            "vector_norm",
            lambda *a, dtype=None, **k: (dtypes.append(dtype), norm(*a, dtype=dtype, **k))[1],
        )
        found = Tokens(x).lengths
    assert dtypes == ([None] if quick else [None, torch.float64])
    wanted = x.double().square().sum(2).sqrt()
    assert float((found / wanted - 1).abs().max()) < 2e-7
