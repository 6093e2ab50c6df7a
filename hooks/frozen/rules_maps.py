"""Rules of path arithmetic for maps with weights and for products: what is linear in one operand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.linear_maps import linear
from rc_probe.hooks.operator_rules import Rules

from .parts import HELD, NO_PARTS, Parts, aligned, common, plain

rule = Rules(Parts)

# ---- maps with weights


@rule("linear")
def _linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(weight, Parts) or isinstance(bias, Parts) or not isinstance(input, Parts):
        return NotImplemented
    value = func(input.value, weight, bias)
    return mapped(value, input, lambda p: linear(p, weight), bias, fresh=True)


def mapped(
    value: Tensor, x: Parts, function: Callable[[Tensor], Tensor], bias: Any = None, *, fresh: bool = False
) -> Parts:
    """What a linear map makes of x: `function` takes and gives (channels, …). fresh: never a view of what it takes."""
    ledger = x.ledger
    return Parts(
        value, lambda: ledger.with_constant(function(x.parts), bias), ledger, bilinear=x.bilinear, fresh=fresh
    )


def scaled(
    value: Tensor, x: Parts, function: Callable[[Tensor, Tensor | None], Tensor], bias: Any = None
) -> Parts:
    """As `mapped`, of a map that works entry by entry: function(parts, out) may write into `out`, which can be `parts`."""
    ledger = x.ledger
    return Parts(
        value,
        lambda: ledger.with_constant(function(*x.taken(value)), bias),
        ledger,
        bilinear=x.bilinear,
        fresh=True,
    )


@rule("matmul rmatmul bmm mm mv")
def _matmul(func: Any, x: Any, y: Any) -> Any:
    value = func(plain(x), plain(y))
    x, y = (y, x) if func.__name__ == "__rmatmul__" else (x, y)
    if any(isinstance(a, Parts) and a.ndim < 2 for a in (x, y)):
        return NotImplemented
    if isinstance(x, Parts) and isinstance(y, Parts):
        return product(value, x, y, lambda p, w: torch.matmul(aligned(p, w.ndim), w), weigh)
    if isinstance(x, Parts):
        by = (lambda p: linear(p, y.mT)) if y.ndim == 2 else lambda p: torch.matmul(aligned(p, y.ndim), y)
        return mapped(value, x, by, fresh=True)
    return mapped(value, y, lambda p: weigh(p, x), fresh=True)


def weigh(parts: Tensor, weights: Tensor) -> Tensor:
    """Weights (…, T, S) times each of parts (channels, …, S, d): the channels side by side in one product."""
    parts = aligned(parts, weights.ndim)
    side = parts.movedim(0, -2)  # (…, S, channels, d)
    out: Tensor = torch.matmul(weights, side.flatten(-2)).unflatten(-1, side.shape[-2:])
    return out.movedim(-2, 0)


@rule("addmm baddbmm addbmm")
def _addmm(func: Any, input: Any, *args: Any, beta: Any = 1, alpha: Any = 1, **named: Any) -> Any:
    first, second = [*args, *named.values()]
    value = func(plain(input), plain(first), plain(second), beta=beta, alpha=alpha)
    if func.__name__.startswith("addbmm"):
        return NotImplemented
    out = torch.matmul(first, second)
    out = out if alpha == 1 else out * alpha
    out = out + (input if beta == 1 else input * beta)
    if isinstance(out, Parts):
        out.value = value
    return out


@rule("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
def _conv(func: Any, input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
    if isinstance(weight, Parts) or isinstance(bias, Parts) or not isinstance(input, Parts):
        return NotImplemented
    value = func(input.value, weight, bias, *args, **kwargs)
    axes = weight.ndim - 2

    def run(p: Tensor) -> Tensor:
        batched = p if input.ndim == axes + 2 else p.unsqueeze(1)
        out: Tensor = func(batched.flatten(0, 1), weight, None, *args, **kwargs).unflatten(
            0, batched.shape[:2]
        )
        return out if input.ndim == axes + 2 else out.squeeze(1)

    return mapped(value, input, run, None if bias is None else bias.reshape(-1, *[1] * axes))


@rule("grouped_mm")
def _grouped(func: Any, input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Experts: rows of the stream, each times the weights of its group."""
    if isinstance(weight, Parts) or not isinstance(input, Parts) or kwargs.get("bias") is not None:
        return NotImplemented
    value = func(input.value, weight, *args, **kwargs)
    return mapped(value, input, lambda p: torch.stack([func(q, weight, *args, **kwargs) for q in p]))


@rule("grid_sample")
def _grid_sample(func: Any, input: Any, grid: Any, *args: Any, **kwargs: Any) -> Any:
    """Where it is sampled is held."""
    grid = plain(grid)
    value = func(plain(input), grid, *args, **kwargs)
    if not isinstance(input, Parts):
        return value
    return mapped(value, input, torch.vmap(lambda p: func(p, grid, *args, **kwargs)))


@rule("einsum")
def _einsum(func: Any, equation: Any, *operands: Any, **kwargs: Any) -> Any:
    operands = (
        tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    )
    streams = [i for i, a in enumerate(operands) if isinstance(a, Parts)]
    value = func(equation, *plain(operands))
    if not isinstance(equation, str) or len(streams) > 2:
        return NotImplemented

    def run(at: int) -> Callable[[Tensor, Any], Tensor]:
        others = [plain(a) for a in operands]
        return lambda p, _: torch.vmap(lambda q: func(equation, *others[:at], q, *others[at + 1 :]))(p)

    if len(streams) == 1:
        stream = operands[streams[0]]
        return mapped(value, stream, lambda p: run(streams[0])(p, None))
    first, second = streams
    return product(value, operands[first], operands[second], run(first), run(second))


# ---- products


@rule("mul rmul imul multiply")
def _mul(func: Any, x: Any, y: Any) -> Any:
    value = func(plain(x), plain(y))
    if isinstance(x, Parts) and isinstance(y, Parts):
        if x.root is y.root and value.shape == x.shape == y.shape:
            return _self_gated(value, x, y)
        return product(value, x, y, _times, _times)
    stream, factor = (x, y) if isinstance(x, Parts) else (y, x)
    held = getattr(factor, HELD, None) is stream.root  # x * sigmoid(x) is an activation

    def parts() -> Tensor:
        p, out = stream.taken(value)
        return _times(p, factor, out)

    return Parts(
        value, parts, stream.ledger, gate=stream.gate or held,
        bilinear=stream.bilinear, root=stream.root if value.shape == stream.shape else None, fresh=True,
    )  # fmt: skip


def _self_gated(value: Tensor, x: Parts, y: Parts) -> Parts:
    """An activation written as a product, such as x (1 + tanh x): what came out of one already is its gate."""
    stream, factor = (y, x.value) if x.gate and not y.gate else (x, y.value)
    return Parts(
        value, lambda: _times(stream.parts, factor), x.ledger, gate=True, bilinear=x.bilinear or y.bilinear, root=x.root
    )  # fmt: skip


def _times(parts: Tensor, factor: Any, out: Tensor | None = None) -> Tensor:
    return torch.mul(aligned(parts, factor.ndim) if isinstance(factor, Tensor) else parts, factor, out=out)


def product(
    value: Tensor,
    x: Parts,
    y: Parts,
    left: Callable[[Tensor, Tensor], Tensor],
    right: Callable[[Tensor, Tensor], Tensor],
) -> Parts:
    """A product of two tensors that follow the stream: left(parts of x, y), right(parts of y, x).

    One that came out of an activation is a gate, and held. Else each is held in turn, and half of both is
    taken, which is exact for a form that is linear in each.
    """
    ledger = x.ledger
    if y.gate and not x.gate:
        return Parts(value, lambda: left(x.parts, y.value), ledger, bilinear=x.bilinear)
    if x.gate and not y.gate:
        return Parts(value, lambda: right(y.parts, x.value), ledger, bilinear=y.bilinear)

    def parts() -> Tensor:
        p, q = common([left(x.parts, y.value), right(y.parts, x.value)])
        return (p + q) / 2

    return Parts(value, parts, ledger, bilinear=True)


@rule("div idiv truediv itruediv true_divide divide")
def _div(func: Any, x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    """A denominator is a scale, and held."""
    value = func(plain(x), plain(y), **({} if rounding_mode is None else {"rounding_mode": rounding_mode}))
    if rounding_mode is not None or not isinstance(x, Parts):
        return value
    by = plain(y)
    scaled = lambda: (aligned(x.parts, by.ndim) if isinstance(by, Tensor) else x.parts) / by  # noqa: E731
    root = x.root if value.shape == x.shape else None
    return Parts(value, scaled, x.ledger, gate=x.gate, bilinear=x.bilinear, root=root)


@rule("glu")
def _glu(func: Any, input: Any, dim: int = -1) -> Any:
    first, second = input.chunk(2, dim)
    return first * torch.sigmoid(second)


@rule("numpy tolist array")
def _leak(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    raise RcProbeError(f"`{func.__name__}` takes values of the stream out of torch", todo=NO_PARTS)
