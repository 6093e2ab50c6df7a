"""Heads of a lower rank: their queries projected, before positions turn them, so that their form is the best one of that rank.

With M = AᵀB (A, B the maps of queries and keys) and A = aᵀQ, B = bᵀQ′, the truncation of M is that of a bᵀ = U S Vᵀ. It is
AᵀPB with P = a⁺ U_r U_rᵀ a: the score of a query q is that of Pᵀq, whichever key it meets. So keys stay as they are, one key
may serve a group of query heads, and where positions turn both, P stands before the turn: the rank is at most r at every offset.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.one_thread import small_matrices
from rc_probe.hooks.structure.structure import Structure
from rc_probe.hooks.undo import unseen

from .forms import Heads
from .moments import kept_moments

LEAST = 1e-12  # of the largest: below, a direction carries nothing


def rank_matrices(structure: Structure, heads: Heads, rank: int, method: str) -> Tensor:
    """(heads, width, width): P of every head, for queries q and keys k as they are before positions turn them: qᵀPk."""
    return METHODS[method](structure, heads, rank)


def rank_edit(
    edits: Edits, structure: Structure, heads: Heads, chosen: list[int], rank: int, method: str
) -> None:
    """Add to `edits` what gives the heads `chosen` (from 0) of a block the rank `rank`, at most their width. At the width nothing.

    method: `weights`, the best for any input; `data`, the best for the inputs that moments were kept of; `bottom`, the
    smallest singular values; `random`, a subspace drawn by block and head
    """
    if rank == heads.width:
        return
    projection, held = heads.query, list[Tensor]()
    features = projection.features[chosen]

    def matrix() -> Tensor:
        """(chosen, width, width), once it is needed: moments may be read between."""
        if not held:
            made = rank_matrices(structure, heads, rank, method)[chosen]
            scale = projection.scale[chosen]
            held.append(scale[:, :, None] * made / scale[:, None, :])
        return held[0]

    edits.at_module(
        heads.block.index,
        projection.name,
        projection.turn,
        partial(_project, structure, heads, features, matrix),
    )


def _project(
    structure: Structure, heads: Heads, features: Tensor, matrix: Callable[[], Tensor], x: Tensor, y: Tensor
) -> Tensor:
    """y with the queries of some heads, row by row, times their matrices."""
    with unseen():
        if y.shape[-1] <= int(features.max()):
            what = (
                f"{heads.query.name} returns {y.shape[-1]} features, and did more when the model was attached"
            )
            raise structure.error(heads.block, what, "Attach again")
        wide = torch.promote_types(y.dtype, torch.float32)
        at = features.flatten().to(y.device)
        rows = y[..., at].unflatten(-1, features.shape).to(wide)
        made = torch.einsum("...hw,hwv->...hv", rows, matrix().to(y.device, wide))
        changed: Tensor = y.index_copy(-1, at, made.flatten(-2).to(y.dtype))
    return changed


def projector(a: Tensor, kept: Tensor) -> Tensor:
    """a⁺ U_r U_rᵀ a, (heads, width, width). kept: U_r (heads, width, r)."""
    with small_matrices(a):
        found: Tensor = torch.linalg.pinv(a, rtol=LEAST) @ kept @ kept.mT @ a
    return found


def _left(a: Tensor, b: Tensor) -> Tensor:
    """The left singular vectors of a bᵀ, the largest first."""
    with small_matrices(a):
        left: Tensor = torch.linalg.svd(a @ b.mT).U
    return left


def _weights(structure: Structure, heads: Heads, rank: int) -> Tensor:
    return projector(heads.qk.a, _left(heads.qk.a, heads.qk.b)[..., :rank])


def _bottom(structure: Structure, heads: Heads, rank: int) -> Tensor:
    return projector(heads.qk.a, _left(heads.qk.a, heads.qk.b)[..., heads.width - rank :])


def _random(structure: Structure, heads: Heads, rank: int) -> Tensor:
    drawn = []
    for head in range(heads.count):
        generator = torch.Generator().manual_seed(1_000_003 * (heads.block.index + 1) + head)
        noise = torch.randn(heads.width, heads.width, dtype=torch.float64, generator=generator)
        drawn.append(torch.linalg.qr(noise).Q[:, :rank])
    return projector(heads.qk.a, torch.stack(drawn))


def _data(structure: Structure, heads: Heads, rank: int) -> Tensor:
    a, b = (_root(moment) for moment in kept_moments(structure, heads))
    return projector(a, _left(a, b)[..., :rank])


def _root(moment: Tensor) -> Tensor:
    """The symmetric root of second moments (heads, width, width); what rounding leaves below 0 is 0."""
    with small_matrices(moment):
        values, vectors = torch.linalg.eigh(moment)
    values = values.where(values > LEAST * values.amax(-1, keepdim=True), 0)
    root: Tensor = (vectors * values.sqrt()[..., None, :]) @ vectors.mT
    return root


METHODS: dict[str, Callable[[Structure, Heads, int], Tensor]] = {
    "weights": _weights, "data": _data, "bottom": _bottom, "random": _random,
}  # fmt: skip
