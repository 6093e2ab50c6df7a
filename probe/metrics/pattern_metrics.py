"""What one attention pattern does, head by head: how even it is, where it goes, what it forgets.

A pattern A is (windows, heads, queries, keys), rows of weights that are not below zero; `seen`, of the same shape (one head
where all see the same), says which keys each query may see. What is returned is (heads,) in float64, NaN where nothing can be
said; windows are averaged, of the Dobrushin coefficient the largest counts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rc_probe.hooks.one_thread import small_matrices

FEW = 8  # keys or queries; a mean over fewer says nothing
SINK = 0.3  # mean attention to one key


def entropy(pattern: Tensor, seen: Tensor) -> Tensor:
    """Mean over queries of −Σ a ln a / ln n, n keys that it may see, of those that see two or more: 0 one key, 1 all alike.

    >>> entropy(torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]]), torch.ones(1, 1, 2, 2).bool())
    tensor([0.5000], dtype=torch.float64)

    Where a learned sink takes a part of each row, of what is left. Source: Zhai et al. 2023 (arXiv 2303.06296), over ln n.
    """
    a = pattern.double()
    a = a / a.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    keys = seen.sum(-1).double()
    return _mean(torch.special.entr(a).sum(-1) / keys.clamp_min(2).log(), keys >= 2)


def received(pattern: Tensor, seen: Tensor) -> Tensor:
    """(heads, keys): mean attention to each key, over the other queries that may see it; NaN where fewer than FEW may.

    Queries and keys are the same tokens where there are as many: what a token gives to itself is left out. Fewer than FEW are
    enough where there are no more. Source: Gu et al. 2024 (arXiv 2410.10781), where a sink gets more than .3 so.
    """
    queries, keys = pattern.shape[-2:]
    others = seen if queries != keys else seen & ~torch.eye(keys, dtype=torch.bool, device=seen.device)
    count = others.sum(-2).double()
    mean = (pattern * others).sum(-2, dtype=torch.float64) / count.clamp_min(1)
    enough = count >= min(FEW, max(1, queries - 1))
    return mean.masked_fill(~enough, math.nan).mean(0)


def dobrushin(pattern: Tensor) -> Tensor:
    """½ max over i, j of Σ_k |A_ik − A_jk|: 0 all queries do the same, 1 two of them see nothing in common."""
    windows, heads = pattern.shape[:2]
    return furthest_rows(pattern.double().flatten(0, 1)).view(windows, heads).amax(0).clamp(max=1)


def furthest_rows(matrices: Tensor) -> Tensor:
    """½ max over i, j of Σ_k |A_ik − A_jk| of each of the matrices (n, rows, columns), (n,); 0 where there is one row."""
    if matrices.shape[1] < 2:
        return matrices.new_zeros(len(matrices))
    return torch.stack([torch.pdist(one, p=1).amax() / 2 for one in matrices])


def singular_gap(pattern: Tensor) -> Tensor:
    """σ₁ / σ₂, at most 1 / rounding: the larger, the nearer to a pattern of rank one.

    Source: Saada, Naderi, Tanner 2025, Mind the Gap (PMLR 267).
    """
    a = pattern.double()
    square = a @ a.mT if a.shape[-2] <= a.shape[-1] else a.mT @ a
    if square.shape[-1] < 2:
        return a.new_full((pattern.shape[1],), math.nan)
    with small_matrices(square):
        values = torch.linalg.eigvalsh(square)
    second, first = values[..., -2:].clamp_min(0).sqrt().unbind(-1)
    least = torch.finfo(pattern.dtype).eps * first
    gap: Tensor = (first / torch.maximum(second, least)).mean(0)
    return gap


def logit_variance(pattern: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The variance of the scores, and β / β_c: over 1 a few keys hold what a query sees (entropy collapse), below 1 many do
    (rank collapse).

    The scores are ln a and a number that all of a row share; a weight of exactly zero counts as the least positive number.
    The variance v of a query's scores over the keys that it may see, mean over queries that see FEW or more.
    Scores of variance β² ln n, tokens of overlap p: attention freezes at β_c = √(2 / (1 − p)). What all tokens share moves no
    weight, so that v is β² (1 − p) ln n, and (β / β_c)² = v / (2 ln n), whatever p is: the root of its mean over the same
    queries. Source: Giorlandino, Goldt 2025 (arXiv 2505.24333), for Gaussian scores.
    """
    tiny = torch.finfo(pattern.dtype).tiny
    scores = pattern.clamp_min(tiny).double().log().masked_fill(~seen, 0)
    keys = seen.sum(-1).double()
    count = keys.clamp_min(1)
    centred = (scores - (scores.sum(-1) / count)[..., None]).masked_fill(~seen, 0)
    variance = centred.square().sum(-1) / count
    phase = _mean(variance / (2 * keys.clamp_min(2).log()), keys >= FEW).sqrt()
    return _mean(variance, keys >= FEW), phase


def least_weight(pattern: Tensor, seen: Tensor) -> Tensor:
    """The smallest weight that a query gives to a key that it may see."""
    return pattern.masked_fill(~seen, math.inf).amin((0, 2, 3)).double()


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Over windows and queries of (windows, heads, queries), of those that are counted; NaN without any."""
    counted = counted.expand_as(values)
    total = values.masked_fill(~counted, 0).sum((0, 2))
    count = counted.sum((0, 2)).double()
    return (total / count).masked_fill(count == 0, math.nan)
