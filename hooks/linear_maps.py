"""Products of many rows with one table of weights: the largest part of what parts of a stream cost."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LARGE = 2**24  # multiply-adds from which on the other library is worth its call
TABLE = 2**25  # weights of half precision that are not copied as a whole
ROWS = 2**12  # of a table that are copied at a time: a part of a processor's cache


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (…, in) times weight (out, in): (…, out), as `functional.linear` without a bias, to rounding.

    >>> linear(torch.ones(2, 3), torch.ones(4, 3)).shape
    torch.Size([2, 4])

    Large products in float32 on a processor with AVX-512 go through oneDNN, which comes with torch. torch takes MKL for
    them, which is half as fast on processors that are not Intel's. No gradients.
    """
    if _large(x, weight) and _has_onednn():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return out
    return functional.linear(x, weight)


def linear_in_single(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, in) in float32 times weight (out, in) in half precision: (…, out) in float32, as `functional.linear`.

    The weights of a head of words may be the largest of a model: no copy in float32 stands beside them.
    """
    out = x.new_empty(*x.shape[:-1], len(weight))
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        out[..., rows] = linear(x, weight[rows].float())
    return out if bias is None else out.add_(bias)


def _large(x: Tensor, weight: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * weight.shape[0] >= LARGE
    )


def _has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and "AVX512" in torch.backends.cpu.get_cpu_capability()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
