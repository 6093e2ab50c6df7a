"""Every metric of any stream is within its floor of the same number computed with more digits, and of what noise makes of it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rc_probe.metrics.stream_metrics import measure
from rc_probe.registry import METRICS

QUICK = [name for name, metric in METRICS.items() if metric.cost != "solver"]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SCALES = (1e-30, 1e-20, 1e-8, 1.0, 1e8, 1e20, 1e30)
KINDS = ("random", "near", "equal", "zero rows", "massive", "ties", "one differs", "on a line", "median tie")
Long = np.ndarray[Any, np.dtype[np.longdouble]]


def rows(kind: str, random: np.random.Generator, T: int, D: int) -> np.ndarray[Any, Any]:
    """(T, D) of one kind, of about size 1."""
    common = random.normal(size=(1, D))
    x = random.normal(size=(T, D)) + random.choice([0, 1, 10]) * common
    match kind:
        case "near":
            x = common * (1 + 10.0 ** random.integers(-8, -1) * random.normal(size=(T, D)))
        case "equal":
            x = np.repeat(x[:1], T, 0)
        case "zero rows":
            x[random.permutation(T)[: random.integers(1, T + 1)]] = 0
        case "massive":
            x[random.integers(T)] *= 10.0 ** random.integers(1, 4)
        case "ties":
            x[random.integers(T)] = x[random.integers(T)]
        case "one differs":
            x = np.repeat(x[:1], T, 0)
            x[-1] *= 1 + 10.0 ** random.integers(-8, 0)
        case "on a line":
            x = random.normal(size=(T, 1)) * random.normal(size=(1, D)) + 10 * common
        case (
            "median tie"
        ):  # half of the norms 1 and half 6, or 5 exactly: what is massive hangs on the median
            x = (
                np.eye(D)[random.integers(D, size=T)]
                * np.where(np.arange(T) < T // 2, 1.0, random.choice([5.0, 6.0]))[:, None]
            )
    return x  # fmt: skip


def sample(seed: int) -> tuple[str, Tensor, Tensor, Tensor | None]:
    """(kind, real tokens (T, D), stream with padding (1, T + P, D), mask)."""
    random = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    T = 2 if random.random() < 0.1 else int(random.integers(2, 200 if random.random() < 0.1 else 30))
    D, pads = int(random.integers(1, 120 if random.random() < 0.1 else 20)), int(random.integers(0, 4))
    x = torch.from_numpy(rows(kind, random, T, D) * random.choice(SCALES)).to(
        DTYPES[seed // len(KINDS) % len(DTYPES)]
    )
    padded = torch.full((1, T + pads, D), 7.0, dtype=x.dtype)
    place = np.sort(random.permutation(T + pads)[:T])
    padded[0, place] = x
    mask = torch.zeros(1, T + pads, dtype=torch.bool)
    mask[0, place] = True
    return kind, x, padded, mask if pads else None


def _size(X: Long) -> Any:
    return np.sqrt(np.abs(X).sum(0).max() * np.abs(X).sum(1).max())


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else 0.0


def _centred(X: Long) -> Long:
    R: Long = X - X.mean(0)
    return R - R.mean(0)


def _cosine(X: Long) -> float:
    """Mean over pairs; a zero row has cosine 0 with every other."""
    norms = np.sqrt((X * X).sum(1, keepdims=True))
    units = np.divide(X, norms, out=np.zeros_like(X), where=norms > 0)
    return float((np.square(units.sum(0)).sum() - (norms > 0).sum()) / (len(X) * (len(X) - 1)))


def _absolute_cosine(X: Long) -> float:
    norms = np.sqrt((X * X).sum(1, keepdims=True))
    units = np.divide(X, norms, out=np.zeros_like(X), where=norms > 0)
    return float(np.abs(units @ units.T)[~np.eye(len(X), dtype=bool)].mean())


def _ranks(X: Long) -> tuple[float, float]:
    s = np.linalg.svd(X.astype(np.float64), compute_uv=False)
    if not s.any():
        return 0.0, 0.0
    p = s[s > 0] / s.sum()
    return float(np.exp(-(p * np.log(p)).sum())), float(np.square(s).sum() / s[0] ** 2)


def by_numpy(real: np.ndarray[Any, Any]) -> dict[str, float]:
    """Each metric of (T, D) with 64 bits of mantissa, except the singular values; scaled by the largest first."""
    scale = np.longdouble(np.abs(real).max() or 1)
    X = real.astype(np.longdouble) / scale
    norms = np.sqrt((X * X).sum(1))
    massive = (norms > 5 * np.median(norms)) & (np.median(norms) > 0)
    bulk, R = X[~massive], _centred(X)
    (effective, stable), (effective_bulk, stable_bulk) = _ranks(X), _ranks(bulk)
    return {
        "residual": _ratio(_size(R), _size(X)), "residual_bulk": _ratio(_size(_centred(bulk)), _size(bulk)),
        "residual_frobenius": _ratio(np.sqrt((R * R).sum()), np.sqrt((X * X).sum())),
        "residual_frobenius_absolute": float(np.sqrt((R * R).sum()) * scale), "cosine_absolute": _absolute_cosine(X),
        "residual_absolute": float(_size(R) * scale), "norm": float(norms.mean() * scale),
        "cosine": _cosine(X), "cosine_bulk": _cosine(bulk), "cosine_centred": _cosine(R),
        "massive_share": float(massive.mean()),
        "effective_rank": effective, "stable_rank": stable,
        "effective_rank_bulk": effective_bulk, "stable_rank_bulk": stable_bulk,
    }  # fmt: skip


@pytest.mark.parametrize("part", range(4))
def test_300_random_matrices(part: int) -> None:
    """75 each: masks, dtypes, scales, equal rows, two tokens, zero rows, ties, massive tokens."""
    for seed in range(75 * part, 75 * part + 75):
        kind, x, padded, mask = sample(seed)
        expected = by_numpy(x.double().numpy())
        found = measure(padded, mask, QUICK)
        assert found.keys() == expected.keys()
        for name, wanted in expected.items():
            value, floor = (float(t[0]) for t in found[name])
            assert abs(value - wanted) <= floor, (
                seed,
                kind,
                x.dtype,
                tuple(x.shape),
                name,
                value,
                wanted,
                floor,
            )


@pytest.mark.parametrize("part", range(2))
def test_noise_of_one_eps_moves_no_metric_beyond_its_floor(part: int) -> None:
    for seed in range(75 * part, 75 * part + 75):
        kind, x, padded, mask = sample(seed)
        if kind == "median tie":  # where noise decides which tokens are counted
            continue
        random = np.random.default_rng([seed, 1])
        real = x.double().numpy()
        noisy = real * (1 + torch.finfo(x.dtype).eps * random.uniform(-1, 1, real.shape))
        one, other, found = by_numpy(real), by_numpy(noisy), measure(padded, mask, QUICK)
        for name, (_, floor) in found.items():
            assert abs(one[name] - other[name]) <= float(floor[0]), (seed, kind, x.dtype, name)


def test_the_floor_of_centred_cosines_with_a_massive_token() -> None:
    """27 tokens of norm 1 and one of 10⁶: the mean, 35714, moves by its own noise, and each token stands that far from it."""
    x = torch.zeros(1, 28, 3)
    x[0, :27, :2] = torch.nn.functional.normalize(
        torch.randn(27, 2, generator=torch.Generator().manual_seed(0))
    )
    x[0, 27, 2] = 1e6
    value, floor = (float(t) for t in measure(x, None, ["cosine_centred"])["cosine_centred"])
    noise, T = 4 * 2.0**-23, 28
    assert floor == pytest.approx(2 * noise * ((T - 1) + (T + 1) / (T - 1)) / T, rel=1e-4)
    assert abs(value - by_numpy(x[0].double().numpy())["cosine_centred"]) <= floor


def test_the_floor_of_effective_ranks_knows_the_rounding_of_the_svd() -> None:
    """Equal rows have rank one exactly; in float64 the SVD's own rounding makes more of it than four eps do."""
    row = torch.randn(1, 152, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for x in (row.expand(1, 397, 152), row[:, :128].expand(1, 128, 128), row[:, :59].expand(1, 383, 59)):
        value, floor = (float(t) for t in measure(x, None, ["effective_rank"])["effective_rank"])
        assert abs(value - 1) <= floor < 1e-10
