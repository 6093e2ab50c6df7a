"""How embeddings of whole samples lie: cosines of random pairs, and how many directions they use.

    E = torch.randn(100, 384)
    pair_cosines(E).mean        # near 0: independent directions
    spectrum(E).isoscore        # 1 where all directions vary alike, 0 where one does

All is float64; nothing here is larger than E, but for a square of the smaller of its sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .intervals import ENOUGH, LEVEL, NO_INTERVAL, Interval
from .tokens import NOISE

CHUNK = 1024  # embeddings compared with all others at a time
BINS = 2000  # of cosines from −1 to 1: a quantile is known to a thousandth
FAR = 0.95  # of the pairs lie below `far`


@dataclass(frozen=True)
class Cosines:
    """Of all pairs of different samples. mean, std (ddof 1), and the 95 % interval of the mean over samples.

    far: the cosine that 95 % of the pairs are below, to a thousandth; histogram (BINS,): pairs by cosine, from −1 to 1
    """

    pairs: int
    mean: float
    std: float
    interval: Interval
    far: float
    histogram: Tensor


def pair_cosines(embeddings: Tensor, same: Sequence[int] | None = None) -> Cosines | None:
    """cos(e_i, e_j) over all i ≠ j; None without a pair.

    embeddings (N, D); same (N,): samples of equal numbers are equal, and no pair. A zero vector has cosine 0 with all.

    A sample is in N − 1 pairs, so that pairs are no independent observations: the interval is the jackknife's, which leaves out
    one sample with all its pairs (Efron, Stein 1981, Ann. Statist. 9), by Student's t; none from fewer than 8 samples.
    """
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    count = len(unit)
    kinds = torch.arange(count) if same is None else torch.as_tensor(same)
    squares, histogram = 0.0, torch.zeros(BINS, dtype=torch.float64)
    sums, partners = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        cosines = (unit[part] @ unit.T).clamp(-1, 1)
        others = kinds[part, None] != kinds
        cosines = cosines.where(others, 0.0)
        sums[part], partners[part] = cosines.sum(1), others.sum(1).double()
        squares += float(cosines.square().sum())
        histogram += torch.histc(cosines[others], BINS, -1, 1)
    ordered = float(partners.sum())  # each pair twice
    if not ordered:
        return None
    total, pairs = float(sums.sum()), round(ordered / 2)
    mean = total / ordered
    variance = max(0.0, squares / ordered - mean**2)
    std = math.sqrt(variance * pairs / (pairs - 1)) if pairs > 1 else math.nan
    below = histogram.cumsum(0) / histogram.sum()
    far = round(-1 + 2 * (int((below < FAR).sum()) + 1) / BINS, 6)
    without = (total - 2 * sums) / (ordered - 2 * partners)
    return Cosines(pairs, mean, std, _jackknife(mean, without), far, histogram / 2)


def _jackknife(mean: float, without: Tensor) -> Interval:
    """The 95 % interval of a mean, from what it is without each of the samples."""
    from scipy.special import stdtrit

    n = len(without)
    if n < ENOUGH or not bool(without.isfinite().all()):
        return NO_INTERVAL
    error = math.sqrt((n - 1) / n * float((without - without.mean()).square().sum()))
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * error
    return max(-1.0, mean - half), min(1.0, mean + half)


@dataclass(frozen=True)
class Spectrum:
    """How many directions embeddings use.

    shares: of the variance on each principal component, the largest first; empty where nothing but rounding varies
    isoscore: in [0, 1]; NaN where nothing varies, or in one dimension. rankme: in [1, min(N, D)]; 0 for zeros
    most_isoscore, most_rank: what so many samples can reach
    """

    shares: Tensor
    isoscore: float
    rankme: float
    most_isoscore: float
    most_rank: int


def spectrum(embeddings: Tensor, eps: float = 0.0) -> Spectrum:
    """Principal components, IsoScore and RankMe of embeddings (N, D), not scaled to length 1.

    eps: of the floats that they were computed in. What varies by no more than their rounding does not vary.

    IsoScore (Rudman, Gillman, Rayne, Eickhoff 2022, arXiv 2108.07344, algorithm 1) takes the variances λ of the D principal
    components to the length √D and measures how far they are from (1, …, 1). Its steps come down to

        φ = (Σ λ)² / (D Σ λ²),    IsoScore = (D φ − 1) / (D − 1)

    where D φ is the number of dimensions in use, k where k components vary alike. N samples vary in at most N − 1 directions, so
    that few samples bound it by (min(N − 1, D) − 1) / (D − 1).

    RankMe (Garrido, Balestriero, Najman, LeCun 2023, arXiv 2210.02885) is exp of the entropy of p = σ / Σ σ, σ the singular
    values of the embeddings, not centred; its ε of 10⁻⁷, which keeps a logarithm finite, is left out.
    """
    E = embeddings.double()
    count, dim = E.shape
    largest = float(E.abs().max()) or 1.0
    E = E / largest
    centred = E - E.mean(0)
    variances = torch.linalg.svdvals(centred).square()
    rounding = max(eps, torch.finfo(torch.float64).eps) * float(torch.linalg.matrix_norm(E))
    whole = float(variances.sum())
    shares = variances / whole if whole > (NOISE * rounding) ** 2 else variances[:0]
    used = 1 / float(shares.square().sum()) if len(shares) else math.nan
    singular = torch.linalg.svdvals(E)
    rank = float(torch.special.entr(singular / singular.sum()).sum().exp()) if float(singular.sum()) else 0.0
    over = max(1, dim - 1)
    return Spectrum(
        shares, (used - 1) / over if dim > 1 else math.nan, rank, (min(count - 1, dim) - 1) / over, min(count, dim)
    )  # fmt: skip


def coarse(histogram: Tensor, bins: int) -> list[tuple[float, float, int]]:
    """(low, high, pairs) of wider bins of a histogram of cosines, from the first to the last that is not empty."""
    counts = histogram.reshape(bins, -1).sum(1).numpy()
    edges = np.linspace(-1, 1, bins + 1).round(6)
    there = np.flatnonzero(counts)
    return [
        (float(edges[i]), float(edges[i + 1]), round(float(counts[i])))
        for i in range(there[0], there[-1] + 1)
    ]
