"""Below the float floor: the residual of pure attention, layer by layer, without cancellation.

The paper's figure (Dong et al. 2021, figure 2) ends at the rounding floor of float32, 2e-7, in layer 3. With
the stream kept as centre and residual (hooks/split.py) the cubic law shows down to the end of float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.split.rules import Split, propagate
from rc_probe.metrics.norms import composite_norm

from .layer_weights import one_sample

LEAST = 1e-290  # of max |R|: below, float64 underflows


@dataclass(frozen=True)
class Recursion:
    """Rows of the table `recursion` (without `weights`); why they end before layer L, "" if they do not."""

    rows: list[dict[str, Any]]
    note: str


def recursion(
    blocks: Sequence[Callable[[Split], Any]],
    x: Tensor,
    mask: Tensor | None = None,
    direct: Sequence[float] | None = None,
    *,
    axis: int = -2,
    eps: float | None = None,
    each: Callable[[int, Split], None] | None = None,
) -> Recursion:
    """The relative residual of the stream after each block, down to about 1e-290.

    Parameters
    ----------
    blocks: each runs one block of the network on a Split, skips and MLPs switched off by the caller, and
        returns the stream, alone or first in a tuple
    x: the first stream, (1, T, D), tokens on `axis`
    mask: real tokens, (T,) bool; None if all are
    direct: the relative residual at layers 0..L of the same network in plain arithmetic
    eps: the rounding of that arithmetic, that of x's dtype if None
    each: called as each(l, stream before block l) for l from 1, once block l has run and has a row

    Rows: layer (0..L), residual, residual_direct (None without `direct`), ratio_cubed = r_l / r_{l-1}^3
    (None at layer 0 and beyond floats). Raises RcProbeError where an operation has no rule, naming block and operation, or
    where the residual is not what plain arithmetic gives above its rounding.
    """
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    stream = Split.of(x, axis, mask)
    rows = [_row(0, relative_residual(stream, mask), None, direct, eps)]
    for layer, block in enumerate(blocks, start=1):
        try:
            after = propagate(block, stream).recentred(mask)
        except RcProbeError as error:
            raise RcProbeError(error.what, where=error.where or f"block {layer}", todo=error.todo) from error
        if float(after.residual.abs().max()) < LEAST:
            return Recursion(rows, f"From layer {layer} on the residual is below the range of float64")
        rows.append(_row(layer, relative_residual(after, mask), rows[-1]["residual"], direct, eps))
        if each is not None:
            each(layer, stream)
        stream = after
    return Recursion(rows, "")


def relative_residual(stream: Split, mask: Tensor | None = None) -> float:
    """||res X|| / ||X|| of the real tokens of one sample: composite norm, token mean."""
    x = stream.dense().movedim(stream.axis, -2)
    x = x.reshape(x.shape[-2:])
    size = float(composite_norm(x if mask is None else x[mask]))
    return float(composite_norm(one_sample(stream, mask))) / size if size else 0.0


def _row(
    layer: int, residual: float, before: float | None, direct: Sequence[float] | None, eps: float
) -> dict[str, Any]:
    plain = None if direct is None else float(direct[layer])
    if plain is not None and not abs(residual - plain) <= 0.05 * residual + 1000 * eps:
        raise RcProbeError(
            f"split arithmetic gives a residual of {residual:.3g}, plain arithmetic {plain:.3g}",
            where=f"layer {layer}",
            todo="Nothing below the float floor is shown for this model",
        )
    ratio = residual / before / before / before if before else math.inf
    cubed = ratio if math.isfinite(ratio) else None
    return {"layer": layer, "residual": residual, "residual_direct": plain, "ratio_cubed": cubed}
