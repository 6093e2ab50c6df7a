"""The bound of theorems 2.2 and 2.3 (Dong et al. 2021), with constants from the weights and the data.

One attention layer on X = 1 x^T + R, heads h, D = d_qk:  E_h = R W_Q,h W_K,h^T R^T / sqrt(D) are the scores
less what is common to all rows, and W_h = W_V,h W_O,h. If no row of E_h spreads by more than 1.256,

    ||res(sum_h P_h X W_h)|| <= c ||R||^3,    c = 4 gamma beta H / sqrt(D),    ||·|| = sqrt(||·||_1 ||·||_inf)

beta = max_h ||W_Q,h W_K,h^T||_1 ||W_h||. The paper leaves gamma open; here, with the spreads D_i of row i of
E_h, it is sqrt(sum_i D_i max_i D_i) / (2 ||E_h||_1) for one head. ||·|| is not a norm, so heads are summed in
its two factors, and gamma is what then stands before beta H.

Why it holds for the token mean on the left: P_ij / q_j is within e^{±D_i}, q the pattern of E = 0; so
|P_ij - q_j| <= 2 D_i q_j, and sum_j |P_ij - q_j| <= 2 tanh(D_i / 4). With the mean pattern instead of q,
column sums of absolute differences are at most 4 sum_i D_i and row sums at most max_i D_i: the product of
the two is within 4 sum_i D_i max_i D_i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.split.rules import Split
from rc_probe.metrics.norms import composite_norm, norm_1

from .layer_weights import Heads, one_sample, take_apart

SPREAD = 1.256  # largest D with exp(D) <= 1 + 2 D


def layer_bound(residual: Tensor, heads: Heads) -> dict[str, Any]:
    """The bound for one layer: residual R (T, D) of the tokens that enter it, from any X = 1 x^T + R.

    Returns heads, d_qk, beta, gamma, coefficient, spread (the largest D_i), residual_in (||R||), bound_out
    (for the residual of the layer's output; None beyond floats), trivial_out (what that cannot exceed, whatever the
    patterns are), vacuous, reason. All norms are absolute.
    """
    size = float(residual.abs().max()) or 1.0
    r = residual / size  # E is of second order: do not let it underflow
    count, _, d_qk = heads.w_q.shape
    found = []  # six numbers of each head, which are waited for once
    for w_q, w_k, w_v, w_o in zip(heads.w_q, heads.w_k, heads.w_v, heads.w_o, strict=True):
        w = w_v @ w_o
        e = (r @ w_q) @ (r @ w_k).mT / math.sqrt(d_qk)
        d = e.amax(-1) - e.amin(-1)
        entries = w.abs()
        of_w = entries.sum(-2).amax(), entries.sum(-1).amax()  # ||w||_1 and ||w||_inf
        found.append(torch.stack([norm_1(w_q @ w_k.mT), *of_w, norm_1(e), d.max(), d.sum()]))
    beta, spread = 0.0, 0.0
    columns, rows, plain_columns, plain_rows = 0.0, 0.0, 0.0, 0.0  # ||·||_1 and ||·||_inf, summed over heads
    for w_qk, w_1, w_inf, e_1, widest, total in torch.stack(found).tolist():
        beta = max(beta, w_qk * math.sqrt(w_1 * w_inf))
        spread = max(spread, widest * size * size)
        columns += total / (2 * (e_1 or 1.0)) * w_qk * w_1
        rows += widest / (2 * (e_1 or 1.0)) * w_qk * w_inf
        plain_columns, plain_rows = plain_columns + w_1, plain_rows + w_inf
    coefficient = 4 * math.sqrt(columns) * math.sqrt(rows) / math.sqrt(d_qk)
    residual_in = float(composite_norm(r)) * size
    log_bound = _log10(coefficient) + 3 * _log10(residual_in)
    trivial = residual_in * math.sqrt(len(r) * plain_columns * plain_rows)  # any patterns at all
    reason = _vacuous(spread, coefficient * residual_in**2, log_bound, trivial)
    return {
        "heads": count,
        "d_qk": d_qk,
        "beta": beta,
        "gamma": coefficient * math.sqrt(d_qk) / (4 * beta * count) if beta else 0.0,
        "coefficient": coefficient,
        "spread": spread,
        "residual_in": residual_in,
        "bound_out": 10**log_bound if log_bound < 308 else None,
        "trivial_out": trivial,
        "vacuous": bool(reason),
        "reason": reason,
    }


def _log10(x: float) -> float:
    return math.log10(x) if x > 0 else -math.inf


def _vacuous(spread: float, shrinks: float, log_bound: float, trivial: float) -> str:
    if spread > SPREAD:
        return f"scores spread by {spread:.3g} within a row, the theorem allows {SPREAD}"
    if log_bound >= _log10(trivial):
        return f"not below {trivial:.3g}, which holds for any attention patterns"
    if shrinks >= 1:
        return f"does not promise a smaller residual (coefficient × residual² = {shrinks:.3g}, not below 1)"
    return ""


def unrolled(rows: Sequence[dict[str, Any]]) -> list[float | None]:
    """log10 of theorem 2.2's bound on residual_out after layers 1 … l, c^((3^l - 1)/2) r_0^(3^l).

    rows: coefficient, residual_in, residual_out of consecutive layers. r_0 is the first residual_in, c as
    `_largest_coefficients` has it. None where it is beyond floats.
    """
    found: list[float | None] = []
    for number, base in enumerate(_largest_coefficients(rows), start=1):
        power = 3.0**number if number < 600 else math.inf
        value = (power - 1) / 2 * base + power * _log10(rows[0]["residual_in"])
        found.append(value if math.isfinite(value) else None)
    return found


def why_unrolled_is_vacuous(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why the bound of `unrolled` says nothing after layers 1 … l; "" where it says something.

    It says nothing if a layer so far spreads its scores more than the theorem allows; if c r_0^2 >= 1, since it
    then grows with depth; and if it is not below r_0 times what each layer so far can make of a residual
    at most, whatever its patterns are: trivial_out / residual_in, and the n of the norm before it.
    """
    found = []
    spread, trivial, start = 0.0, 0.0, _log10(rows[0]["residual_in"]) if rows else 0.0
    both = zip(_largest_coefficients(rows), unrolled(rows), strict=True)
    for layer, (base, bound) in enumerate(both, start=1):
        row = rows[layer - 1]
        spread = max(spread, row["spread"])
        trivial += _log10(row["trivial_out"]) - (
            _log10(rows[layer - 2]["residual_out"]) if layer > 1 else 0.0
        )
        reason = ""
        if spread > SPREAD:
            reason = f"up to here scores spread by {spread:.3g} within a row, the theorem allows {SPREAD}"
        elif base + 2 * start >= 0:
            reason = f"grows with depth (coefficient × residual² at layer 1 = 10^{base + 2 * start:.3g}, not below 1)"
        elif bound is not None and bound >= trivial:
            reason = f"not below 10^{trivial:.3g}, which holds for any attention patterns"
        found.append(reason)
    return found


def _largest_coefficients(rows: Sequence[dict[str, Any]]) -> list[float]:
    """log10 of the largest coefficient of layers 1 … l, times n^3 where a norm before a layer scales the residual by n
    (measured; the theorem's network has none)."""
    found: list[float] = []
    for place, row in enumerate(rows):
        gain = row["residual_in"] / rows[place - 1]["residual_out"] if place else 1.0
        found.append(max([_log10(row["coefficient"]) + 3 * _log10(gain), *found[-1:]]))
    return found


class Bounds:
    """Rows of the table `bounds` (without `weights`), layer by layer as a recursion goes on.

    branch(l) is what runs block l and returns its attention branch's value (see `take_apart`). An instance is
    what `recursion` calls with `each`. `why` says why there are no rows, "" if there are.
    """

    def __init__(self, branch: Callable[[int], Callable[[Split], Split]], mask: Tensor | None = None) -> None:
        self.branch, self.mask = branch, mask
        self.measured: list[dict[str, Any]] = []
        self.heads: list[Heads] = []  # of the layers so far
        self.why = ""

    def __call__(self, layer: int, stream: Split) -> None:
        if self.why:
            return
        try:
            tokens, heads, out = take_apart(self.branch(layer), stream)
        except RcProbeError as error:
            self.why = f"block {layer}: {error}"
            return
        self.heads.append(heads)
        row = layer_bound(one_sample(tokens, self.mask), heads)
        residual_out = float(composite_norm(one_sample(out, self.mask)))
        self.measured.append({"layer": layer, **row, "residual_out": residual_out})

    def rows(self) -> list[dict[str, Any]]:
        """Rows with the unrolled bound and its flag; empty if a layer is not covered."""
        if self.why:
            return []
        whole = self.measured
        return [
            {**row, "log10_bound_unrolled": bound, "unrolled_vacuous": bool(why), "unrolled_reason": why}
            for row, bound, why in zip(whole, unrolled(whole), why_unrolled_is_vacuous(whole), strict=True)
        ]
