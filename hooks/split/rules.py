"""Arithmetic that keeps a stream X = 1 c^T + R apart as (c, R), far below the floor of floats.

The model's own code runs on a `Split`; each operation has a rule that gives the new centre and the new
residual without ever adding the two, so that R is right to rounding when it is 1e-150 of c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from rc_probe.hooks.errors import RcProbeError, reason
from rc_probe.hooks.operator_rules import Rules, Traced

from .rules_attention import Attention, Observer, enter_projection, scores, watching
from .tensors import NO_RULE, Lost, Split, double, shared

rule = Rules(Split)

__all__ = ["Attention", "Observer", "Split", "propagate", "watching"]


def propagate(call: Callable[..., Any], x: Split, *args: Any, **kwargs: Any) -> Split:
    """Run a block on a split stream of one sample.

    call(x, *args, **kwargs) returns the stream, alone or first in a tuple. Returns a Split whose residual
    has zero mean. Raises RcProbeError naming the operation without a rule whose result reached the stream.
    """
    try:
        with torch.no_grad():
            out = call(x, *args, **kwargs)
    except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
        what = f"the block does not run in split arithmetic ({reason(error)})"
        raise RcProbeError(what, todo=NO_RULE) from error
    out = out[0] if isinstance(out, tuple | list) else out
    if isinstance(out, Lost):
        raise RcProbeError(f"`{out.op}` has no rule in split arithmetic", todo=NO_RULE)
    if not isinstance(out, Split):
        raise RcProbeError("the block's output is not computed from its input", todo=NO_RULE)
    if not out.uniform:
        raise RcProbeError("the block adds to the stream what depends on the position", todo=NO_RULE)
    if not bool(out.residual.isfinite().all() & out.center.isfinite().all()):
        raise RcProbeError("the block's output is not finite in split arithmetic", todo=NO_RULE)
    return out.recentred()


# ---- entries that change places, sums along features


@rule(
    "view reshape flatten unflatten transpose permute swapaxes swapdims movedim moveaxis unsqueeze squeeze "
    "getitem split split_with_sizes chunk tensor_split unbind expand expand_as narrow select T mT t cat "
    "concat concatenate stack neg mean sum repeat_interleave index_select view_as reshape_as broadcast_to flip"
)
def _move(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Linear without an operand of its own. The token axis is found where the tokens' numbers went."""
    kwargs.pop("dtype", None)
    leaves = tree_leaves((args, kwargs))
    if any(isinstance(a, Tensor) and a.is_floating_point() and not isinstance(a, Split) for a in leaves):
        return NotImplemented
    splits = [a for a in leaves if isinstance(a, Split)]
    uniform = all(s.uniform for s in splits)
    func = Tensor.reshape if func is Tensor.view else func  # the parts may have other strides than the whole

    def run(part: Callable[[Split], Tensor]) -> Any:
        moved, named = tree_map(lambda a: part(a) if isinstance(a, Split) else a, (args, kwargs))
        return func(*moved, **named)

    whole, spec = tree_flatten(run(lambda s: s.center.expand(s.shape).contiguous()))
    rest = tree_leaves(run(lambda s: s.residual))
    found = _axes(func, args, kwargs, leaves, lambda: run(_numbers))
    axes = [axis for axis in found if axis is not None]
    if len(axes) < len(found):
        return NotImplemented
    out = [
        Split(center.narrow(axis, 0, 1) if uniform else center, residual, axis)
        for center, residual, axis in zip(whole, rest, axes, strict=True)
    ]
    return tree_unflatten([_from(splits[0], y) for y in out] if len(splits) == 1 else out, spec)


PLAIN = (Split, int, float, str, slice, type(None), type(...))
_known_axes: dict[tuple[Any, str], list[int | None]] = {}


def _axes(
    func: Any, args: Any, kwargs: Any, leaves: list[Any], numbers: Callable[[], Any]
) -> list[int | None]:
    """The token axis of each result. `numbers` moves the tokens' numbers about, once for each operation and its shapes."""
    if not all(isinstance(a, PLAIN) for a in leaves):  # an index of numbers may be another each time
        return [_token_axis(number) for number in tree_leaves(numbers())]
    shapes = tree_map(lambda a: (tuple(a.shape), a.axis) if isinstance(a, Split) else a, (args, kwargs))
    key = (func, repr(shapes))
    if key not in _known_axes:
        _known_axes[key] = [_token_axis(number) for number in tree_leaves(numbers())]
    return _known_axes[key]


def _token_axis(number: Tensor) -> int | None:
    """The one axis along which the token changes; None for one token alone, and for tokens on two axes (windows)."""
    axes = [a for a in range(-number.ndim, 0) if bool((number != number.narrow(a, 0, 1)).any())]
    return axes[0] if len(axes) == 1 else None


def _from(x: Split, y: Split) -> Split:
    """y is x, moved or scaled: it came from the same weight matrix."""
    y.source = x.source
    return y


def _numbers(s: Split) -> Tensor:
    """Each entry's token number, from 1."""
    number = torch.arange(1.0, s.shape[s.axis] + 1, dtype=torch.float64, device=s.device)
    return number.view(-1, *[1] * (-s.axis - 1)).expand(s.shape).contiguous()


@rule("to type type_as float double half bfloat16 contiguous clone detach cpu cuda data positive")
def _same(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Casts never leave float64; copies stay what they are."""
    return _from(x, Split(x.center, x.residual, x.axis)) if isinstance(x, Split) else NotImplemented


@rule("dropout feature_dropout alpha_dropout")
def _dropout(func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return NotImplemented if training and p else _same(func, input)


@rule("zeros_like")
def _zeros_like(func: Any, x: Any, **kwargs: Any) -> Any:
    return Split(torch.zeros_like(x.center.narrow(x.axis, 0, 1)), torch.zeros_like(x.residual), x.axis)


@rule("zeros_like", on=Lost)
def _no_longer_lost(func: Any, x: Any, **kwargs: Any) -> Any:
    return torch.zeros(x.shape, dtype=torch.float64, device=x.device)


@rule("copy")
@rule("copy", on=Lost)
def _copy(func: Any, x: Any, source: Any, non_blocking: bool = False) -> Any:
    """In place, the old values gone: an operand that is edited."""
    if source.shape != x.shape:
        return NotImplemented
    if isinstance(source, Traced):
        return (
            Split(source.center, source.residual, source.axis)
            if isinstance(source, Split)
            else NotImplemented
        )
    axis = x.axis if isinstance(x, Split) else -2
    return Split(shared(source, axis), torch.zeros_like(double(source)), axis)


# ---- arithmetic


@rule("add radd iadd")
def _add(func: Any, x: Any, y: Any, *, alpha: Any = 1) -> Any:
    y = y if alpha == 1 else y * alpha
    x, y = (x, y) if isinstance(x, Split) else (y, x)
    if not isinstance(y, Split):
        return _from(x, Split(x.center + shared(y, x.axis), x.residual, x.axis))
    return Split(x.center + y.center, x.residual + y.residual, x.axis) if x.axis == y.axis else NotImplemented


@rule("sub isub subtract")
def _sub(func: Any, x: Any, y: Any, *, alpha: Any = 1) -> Any:
    return x + y * -alpha


@rule("rsub")
def _rsub(func: Any, x: Any, y: Any, *, alpha: Any = 1) -> Any:
    return y + x * -alpha


@rule("mul rmul imul multiply")
def _mul(func: Any, x: Any, y: Any) -> Any:
    x, y = (x, y) if isinstance(x, Split) else (y, x)
    if not isinstance(y, Split):
        return _scaled(x, y, torch.mul)
    if x.axis != y.axis:
        return NotImplemented
    return Split(x.center * y.center, x.center * y.residual + x.residual * y.dense(), x.axis)


@rule("div idiv truediv itruediv true_divide divide")
def _div(func: Any, x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        return NotImplemented
    return x * y.reciprocal() if isinstance(y, Split) else _scaled(x, y, torch.div)


@rule("rdiv rtruediv")
def _rdiv(func: Any, x: Any, y: Any) -> Any:
    return y * x.reciprocal()


def _scaled(x: Split, y: Any, by: Callable[[Any, Any], Tensor]) -> Split:
    y = shared(y, x.axis)
    return _from(x, Split(by(x.center, y), by(x.residual, y), x.axis))


@rule("pow ipow")
def _pow(func: Any, x: Any, p: Any) -> Any:
    """(c + r)^p - c^p in forms that do not cancel."""
    if not isinstance(x, Split) or isinstance(p, Tensor):
        return NotImplemented
    c, r = x.center, x.residual
    if p == 2:
        return Split(c * c, r * (2 * c + r), x.axis)
    if p == -1:
        return Split(1 / c, -r / (c * (c + r)), x.axis)
    if p == 0.5:
        return Split(c.sqrt(), r / (c.sqrt() + (c + r).sqrt()), x.axis)
    if p == -0.5:
        return Split(c.rsqrt(), c.rsqrt() * torch.expm1(-0.5 * torch.log1p(r / c)), x.axis)
    return NotImplemented


@rule("square")
def _square(func: Any, x: Any) -> Any:
    return x**2


@rule("reciprocal")
def _reciprocal(func: Any, x: Any) -> Any:
    return x**-1


@rule("sqrt")
def _sqrt(func: Any, x: Any) -> Any:
    return x**0.5


@rule("rsqrt")
def _rsqrt(func: Any, x: Any) -> Any:
    return x**-0.5


# ---- linear maps, norms


@rule("linear")
def _linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(weight, Traced) or isinstance(bias, Traced) or input.axis == -1:
        return NotImplemented
    return _projected(input, double(weight).mT, double(bias))


def _projected(x: Split, weight: Tensor, bias: Tensor | None = None) -> Split:
    x, number = enter_projection(x)
    center = x.center @ weight
    out = Split(center if bias is None else center + bias, x.residual @ weight, x.axis)
    out.source = (number, x)
    return out


@rule("matmul rmatmul bmm")
def _matmul(func: Any, x: Any, y: Any) -> Any:
    x, y = (y, x) if func.__name__ == "__rmatmul__" else (x, y)
    if isinstance(x, Split) and isinstance(y, Split):
        return scores(x, y) if (x.axis, y.axis) == (-2, -1) else NotImplemented
    if isinstance(x, Split) and x.axis < -1 and y.ndim > 1:
        return _projected(x, double(y))
    return NotImplemented


@rule("addmm baddbmm")
def _addmm(func: Any, input: Any, *args: Any, beta: Any = 1, alpha: Any = 1, **named: Any) -> Any:
    first, second = [*args, *named.values()]
    return torch.matmul(first, second) * alpha + input * beta


@rule("layer_norm")
def _layer_norm(
    func: Any, input: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, **named: Any
) -> Any:
    dims = [-1 - i for i in range(len(shape))]
    if not isinstance(input, Split) or input.axis in dims:
        return NotImplemented
    a = input.center - input.center.mean(dims, keepdim=True)
    b = input.residual - input.residual.mean(dims, keepdim=True)
    return _affine(_unit(a, b, dims, eps, input.axis), weight, bias)


@rule("rms_norm")
def _rms_norm(func: Any, input: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    dims = [-1 - i for i in range(len(shape))]
    if not isinstance(input, Split) or input.axis in dims:
        return NotImplemented
    if eps is None:
        eps = torch.finfo(torch.float64 if weight is None else weight.dtype).eps
    return _affine(_unit(input.center, input.residual, dims, eps, input.axis), weight, None)


def _unit(a: Tensor, b: Tensor, dims: list[int], eps: float, axis: int) -> Split:
    """(a + b) / rms(a + b) as a Split: with its scale s = s0 + ds, the parts are a s0 and a ds + b s."""
    va = a.square().mean(dims, keepdim=True) + eps
    dv = (b * (2 * a + b)).mean(dims, keepdim=True)
    log_ratio = -0.5 * torch.log1p(dv / va)
    s0 = va.rsqrt()
    return Split(a * s0, a * (s0 * torch.expm1(log_ratio)) + b * (s0 * torch.exp(log_ratio)), axis)


def _affine(x: Split, weight: Any, bias: Any) -> Any:
    out: Any = x if weight is None else x * weight
    return out if bias is None else out + bias
