"""Rules of path arithmetic for what is linear in the stream: moves, sums, and maps with weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .errors import RcProbeError
from .parts import HELD, NO_PARTS, Parts, aligned, common, numeric, plain, rule

# ---- operations that are linear in all their operands together


@rule(
    "view reshape flatten unflatten transpose permute swapaxes swapdims movedim moveaxis unsqueeze squeeze "
    "getitem split split_with_sizes chunk tensor_split unbind expand expand_as narrow select T mT t "
    "neg mean sum nanmean repeat tile repeat_interleave index_select view_as reshape_as broadcast_to flip roll unfold fold "
    "gather take_along_dim cat concat concatenate stack index_add index_copy index_put index_fill scatter "
    "scatter_add where masked_fill masked_scatter setitem pad cumsum diff tril triu diagonal rot90 "
    "contiguous clone detach cpu cuda data positive view_as_real view_as_complex avg_pool1d avg_pool2d "
    "fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn real imag conj "
    "adaptive_avg_pool1d adaptive_avg_pool2d interpolate upsample pixel_shuffle pixel_unshuffle hstack vstack "
    "zero zeros_like full_like fill upsample_nearest1d upsample_nearest2d movedim channel_shuffle nan_to_num copy"
)
def _linear_in_all(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What these add by themselves (plain operands, fill values) is a constant."""
    value = func(*plain(args), **plain(kwargs))
    sources = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Parts)]
    call = _Linear(func, args, kwargs, sources)
    flat, spec = tree_flatten(value)
    ledger, gate = sources[0].ledger, all(s.gate for s in sources)
    bilinear = any(s.bilinear for s in sources)
    out = [
        Parts(v, partial(call, i), ledger, gate=gate, bilinear=bilinear) if numeric(v) else v
        for i, v in enumerate(flat)
    ]
    return tree_unflatten(out, spec)


FILLS = {"masked_fill", "scatter", "index_fill", "where", "pad", "full_like"}


class _Linear:
    """The parts of the results of an operation that is linear in all its operands together."""

    def __init__(self, func: Any, args: Any, kwargs: Any, sources: list[Parts]) -> None:
        self.func = Tensor.reshape if func is Tensor.view else func  # parts have other strides than the value
        self.flat, self.spec = tree_flatten((args, kwargs))
        self.sources = sources
        self.plain = any(numeric(a) and not isinstance(a, Parts) for a in self.flat)
        self.fills = getattr(self.func, "__name__", "") in FILLS

    def __call__(self, index: int) -> Tensor:
        ledger = self.sources[0].ledger
        parts = common([s.parts for s in self.sources])
        none = [torch.zeros_like(s.value) for s in self.sources]
        out: Tensor = torch.vmap(lambda *p: self._run(p, index, constants=False))(*parts)
        if self.fills:  # numbers that it fills in are in every channel now
            out = out - self._run(none, index, constants=False)
        if not self.plain and not self.fills:
            return out
        return ledger.with_constant(out.clone(), self._run(none, index, constants=True))

    def _run(self, parts: Any, index: int, *, constants: bool) -> Any:
        left = iter(parts)

        def operand(a: Any) -> Any:
            if isinstance(a, Parts):
                return next(left)
            if numeric(a) and not constants:  # in each channel, since the operation may write into it
                return parts[0].new_zeros(a.shape, dtype=a.dtype)
            return a

        args, kwargs = tree_unflatten([operand(a) for a in self.flat], self.spec)
        return tree_leaves(self.func(*args, **kwargs))[index]


@rule("getitem")
def _get_item(func: Any, x: Any, index: Any) -> Any:
    return _linear_in_all(func, x, _indices(index)) if isinstance(x, Parts) else NotImplemented


@rule("setitem")
def _assign(func: Any, x: Any, index: Any, item: Any) -> Any:
    item = item if isinstance(item, Tensor) else torch.as_tensor(item, dtype=x.dtype, device=x.device)
    return _linear_in_all(func, x, _indices(index), item)


def _indices(index: Any) -> Any:
    """Masks as the numbers of the places that they choose."""
    items = index if isinstance(index, tuple) else (index,)
    out: list[Any] = []
    for item in items:
        if isinstance(item, Parts):
            return index
        if isinstance(item, Tensor) and item.dtype == torch.bool and item.ndim:
            out += item.nonzero(as_tuple=True)
        else:
            out.append(item)
    return tuple(out) if isinstance(index, tuple) or len(out) != 1 else out[0]


@rule("to type type_as float double half bfloat16")
def _cast(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Parts):
        return func(x, *plain(args), **plain(kwargs))
    args, kwargs = plain(args), plain(kwargs)
    value = func(x.value, *args, **kwargs)
    if not numeric(value):
        return value
    return Parts(
        value, lambda: x.parts.to(value.device, value.dtype), x.ledger, gate=x.gate, bilinear=x.bilinear, root=x.root
    )  # fmt: skip


@rule("dropout feature_dropout alpha_dropout dropout1d dropout2d")
def _dropout(func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return NotImplemented if training and p else input


# ---- sums and differences


@rule("add radd iadd")
def _add(func: Any, x: Any, y: Any, *, alpha: Any = 1) -> Any:
    value = func(plain(x), plain(y), **({} if alpha == 1 else {"alpha": alpha}))
    return _sum(value, x, y, alpha)


@rule("sub isub subtract")
def _sub(func: Any, x: Any, y: Any, *, alpha: Any = 1) -> Any:
    value = func(plain(x), plain(y), **({} if alpha == 1 else {"alpha": alpha}))
    return _sum(value, x, y, -alpha)


@rule("rsub")
def _rsub(func: Any, x: Any, y: Any, *, alpha: Any = 1) -> Any:
    return _sum(func(plain(x), plain(y), **({} if alpha == 1 else {"alpha": alpha})), y, x, -alpha)


def _sum(value: Tensor, x: Any, y: Any, factor: Any) -> Parts:
    """x + factor y, of which at least one is Parts."""
    both = [a for a in (x, y) if isinstance(a, Parts)]
    ledger = both[0].ledger

    def parts() -> Tensor:
        if len(both) == 1:
            stream, constant = (x, plain(y) * factor) if isinstance(x, Parts) else (y, x)
            p = aligned(stream.parts, value.ndim)
            p = p * factor if stream is y and factor != 1 else p
            return ledger.with_constant(p.expand(len(p), *value.shape).clone(), constant)
        p, q = (aligned(a.parts, value.ndim) for a in (x, y))
        q = q if factor == 1 else q * factor
        if len(p) == len(q):
            return p + q
        short, long = (p, q) if len(p) < len(q) else (q, p)
        out = long.expand(len(long), *value.shape).clone()
        out[: len(short)] += short
        return out

    gate = both[0].gate if len(both) == 1 else x.gate and y.gate
    root = both[0].root if both[-1].root is both[0].root else None
    return Parts(value, parts, ledger, gate=gate, bilinear=any(b.bilinear for b in both), root=root)


# ---- maps with weights


@rule("linear")
def _linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(weight, Parts) or isinstance(bias, Parts) or not isinstance(input, Parts):
        return NotImplemented
    return mapped(func(input.value, weight, bias), input, lambda p: functional.linear(p, weight), bias)


def mapped(value: Tensor, x: Parts, function: Callable[[Tensor], Tensor], bias: Any = None) -> Parts:
    """What a linear map makes of x: `function` takes and gives fresh (channels, …)."""
    ledger = x.ledger
    return Parts(value, lambda: ledger.with_constant(function(x.parts), bias), ledger, bilinear=x.bilinear)


@rule("matmul rmatmul bmm mm mv")
def _matmul(func: Any, x: Any, y: Any) -> Any:
    value = func(plain(x), plain(y))
    x, y = (y, x) if func.__name__ == "__rmatmul__" else (x, y)
    if any(isinstance(a, Parts) and a.ndim < 2 for a in (x, y)):
        return NotImplemented
    if isinstance(x, Parts) and isinstance(y, Parts):
        return product(value, x, y, lambda p, w: torch.matmul(aligned(p, w.ndim), w), weigh)
    if isinstance(x, Parts):
        return mapped(value, x, lambda p: torch.matmul(aligned(p, y.ndim), y))
    return mapped(value, y, lambda p: weigh(p, x))


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
    return Parts(
        value, lambda: _times(stream.parts, factor), stream.ledger, gate=stream.gate or held,
        bilinear=stream.bilinear, root=stream.root if value.shape == stream.shape else None,
    )  # fmt: skip


def _self_gated(value: Tensor, x: Parts, y: Parts) -> Parts:
    """An activation written as a product, such as x (1 + tanh x): what came out of one already is its gate."""
    stream, factor = (y, x.value) if x.gate and not y.gate else (x, y.value)
    return Parts(
        value, lambda: _times(stream.parts, factor), x.ledger, gate=True, bilinear=x.bilinear or y.bilinear, root=x.root
    )  # fmt: skip


def _times(parts: Tensor, factor: Any) -> Tensor:
    return aligned(parts, factor.ndim) * factor if isinstance(factor, Tensor) else parts * factor


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
