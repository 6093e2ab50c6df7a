"""The matrix of a module that is a linear map with a bias, and the gain of one that is a norm: read by what they do, then proved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rc_probe.hooks.errors import RcProbeError

LARGE = 1e3  # inputs so large that a norm's epsilon is nothing beside them


@dataclass(frozen=True)
class Affine:
    """y = weight x + bias, float64. weight: (out, in), bias: (out,)."""

    weight: Tensor
    bias: Tensor

    def after(self, gain: Affine) -> Affine:
        """This map behind a norm's gain, whose weight is a diagonal (in,)."""
        return Affine(self.weight * gain.weight, self.bias + self.weight @ gain.bias)


def affine_map(module: nn.Module, x: Tensor, y: Tensor) -> Affine:
    """The map of `module`, which made y (…, out) of x (…, in).

    A weight of the module itself where that gives y, as it is or transposed; else what the module makes of unit vectors.
    RcProbeError where neither gives y.
    """
    given, wanted = x.flatten(0, -2).double(), y.flatten(0, -2).double()
    for found in _maps(module, x, y):
        made = given @ found.weight.T + found.bias
        if bool(((made - wanted).abs() <= _close(y) * wanted.abs().amax()).all()):
            return found
    name = type(module).__name__
    raise RcProbeError(f"{name} is no linear map with a bias: its weights do not give what it returned")


def _maps(module: nn.Module, x: Tensor, y: Tensor) -> Iterator[Affine]:
    sizes = (y.shape[-1], x.shape[-1])
    own = [p.detach() for p in module.parameters(recurse=False) if p.is_floating_point() and not p.is_meta]
    biases = [p.double() for p in own if p.shape == sizes[:1]] or [_zeros(y)]
    for weight in own:
        if weight.shape == sizes:
            yield from (Affine(weight.double(), bias) for bias in biases)
        if weight.shape == sizes[::-1]:
            yield from (Affine(weight.T.double(), bias) for bias in biases)
    with torch.no_grad():
        try:
            bias = module(torch.zeros_like(x[:1, :1])).double().flatten()
            units = module(torch.eye(sizes[1], dtype=x.dtype, device=x.device)[None])[0].double()
        except Exception:  # the model's own, of any kind: it is no map of single tokens
            return
    yield Affine((units - bias).T, bias)


def _zeros(y: Tensor) -> Tensor:
    return torch.zeros(y.shape[-1], dtype=torch.float64, device=y.device)


def norm_gain(module: nn.Module, like: Tensor) -> Affine | None:
    """The gain and the bias of a norm over the last axis (weight: its diagonal); None where the module is no such norm.

    like: (batch, tokens, dim), what it reads
    """
    generator = torch.Generator().manual_seed(1)
    size = (2, like.shape[-1])
    x = ((torch.rand(size, generator=generator) + 0.5) * torch.randint(0, 2, size, generator=generator).mul(2).sub(1)).to(like)  # fmt: skip
    with torch.no_grad():
        try:
            up, down, more = (module((x * s)[None])[0].double() for s in (LARGE, -LARGE, 4 * LARGE))
        except Exception:  # the model's own, of any kind
            return None
    x = x.double()
    if up.shape != x.shape or not torch.allclose(up, more, rtol=_close(like), atol=_close(like)):
        return None
    bias = (up + down)[0] / 2
    for centred in (x - x.mean(-1, keepdim=True), x):
        gains = (up - down) / 2 / (centred / centred.square().mean(-1, keepdim=True).sqrt())
        size_of = gains.abs().amax()
        if bool(((gains[0] - gains[1]).abs() <= 10 * _close(like) * size_of).all()):
            return Affine(gains[0], bias)
    return None


def _close(x: Tensor) -> float:
    return max(1e-5, 4 * torch.finfo(x.dtype).eps)
