"""The matrix norms of Dong et al. 2021, section 2."""

from torch import Tensor


def norm_1(x: Tensor) -> Tensor:
    """‖X‖₁, the largest column sum of |X|, (..., n, m) -> (...)."""
    return x.abs().sum(-2).amax(-1)


def norm_inf(x: Tensor) -> Tensor:
    """‖X‖∞, the largest row sum of |X|, (..., n, m) -> (...)."""
    return x.abs().sum(-1).amax(-1)


def composite_norm(x: Tensor) -> Tensor:
    """‖X‖₁,∞ = sqrt(‖X‖₁) sqrt(‖X‖∞), (..., n, m) -> (...) float64.

    Two square roots, since the product of the norms underflows first. Not a norm (no triangle inequality).
    """
    size = x.abs()
    return composite(size.sum(-2), size.sum(-1))


def composite(columns: Tensor, rows: Tensor) -> Tensor:
    """‖X‖₁,∞ from the sums of the columns (..., m) and of the rows (..., n) of |X|, (...) float64."""
    return columns.amax(-1).double().sqrt() * rows.amax(-1).double().sqrt()
