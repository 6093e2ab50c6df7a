"""Spectra of the forms of attention heads, and of the scores that they give on data. Pure functions, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from rc_probe.hooks.one_thread import small_matrices


def spectrum(singular: Tensor, width: int, dim: int) -> dict[str, Tensor]:
    """Metrics by name of singular values (heads, width), each (heads,). dim: width of the stream.

    >>> spectrum(torch.tensor([[2.0, 2.0, 0.0]]), 3, 6)["effective_rank"].item()
    2.0
    """
    s = singular.double()
    p = s / s.sum(-1, keepdim=True)
    effective = torch.special.entr(p).sum(-1).exp()
    energy = s.square()
    return {
        "effective_rank": effective,
        "stable_rank": energy.sum(-1) / energy.amax(-1),
        "r90": rank_of(energy, 0.90).double(),
        "r99": rank_of(energy, 0.99).double(),
        "share_of_head": effective / width,
        "share_of_model": effective / dim,
    }


def rank_of(energy: Tensor, share: float) -> Tensor:
    """How many of the largest (…, n) hold this share of their sum; 0 where all are 0."""
    held = energy.sort(-1, descending=True).values.cumsum(-1)
    whole = held[..., -1:]
    return (held < share * whole * (1 - 1e-12)).sum(-1) + (whole[..., 0] > 0)


def shape_of(across: Tensor, norms: Tensor, dim: int) -> dict[str, Tensor]:
    """`symmetric` and `identity` of forms M = AᵀB (heads). across: ABᵀ (heads, width, width); norms: ‖M‖_F.

    tr M = tr BAᵀ and tr M² = tr (BAᵀ)², so that M itself is never made.
    """
    traces = across.diagonal(dim1=-2, dim2=-1).sum(-1)
    squares = (across * across.mT).sum((-2, -1))
    width = min(across.shape[-1], dim)
    return {
        "symmetric": (1 + squares / norms.square()) / 2,
        "identity": traces / (norms * width**0.5),
    }


def centred_rank(query: Tensor, key: Tensor, mask: Tensor | None, share: float = 0.90) -> Tensor:
    """(batch, heads): the rank that holds this share of the energy of row-centred scores q kᵀ among real tokens.

    query, key: (batch, heads, tokens, width); mask: (batch, tokens) bool, None if all are real
    """
    query, key = query.double(), key.double()
    real = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool) if mask is None else mask
    real = real.to(query.device)[:, None, :, None]
    query = query * real
    mean = (key * real).sum(2, keepdim=True) / real.sum(2, keepdim=True)
    key = (key - mean) * real
    # S = q kᵀ: SᵀS has the eigenvalues of √G (kᵀk) √G, G = qᵀq
    squares = query.mT @ query, key.mT @ key
    with small_matrices(squares[0]):
        values, vectors = torch.linalg.eigh(squares[0])
        root = vectors * values.clamp_min(0).sqrt()[..., None, :]
        energy = torch.linalg.eigvalsh(root.mT @ squares[1] @ root).clamp_min(0)
    return rank_of(energy, share)
