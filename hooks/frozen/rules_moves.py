"""Rules of path arithmetic for moves, casts and sums: what is linear in all its operands together."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from rc_probe.hooks.operator_rules import Rules

from .parts import Parts, aligned, common, numeric, plain

rule = Rules(Parts)

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
        out: Tensor = torch.vmap(lambda *p: self._run(p, index, constants=False))(*parts)
        if not self.plain and not self.fills:
            return out
        none = [torch.zeros_like(s.value) for s in self.sources]
        if self.fills:  # numbers that it fills in are in every channel now
            out = out - self._run(none, index, constants=False)
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
        (p, mine), (q, its) = (a.taken(value) for a in (x, y))
        p, q = aligned(p, value.ndim), aligned(q, value.ndim)
        q = q if factor == 1 else torch.mul(q, factor, out=its)
        if len(p) == len(q):
            return torch.add(p, q, out=its if mine is None else mine)
        (short, _), (long, out) = sorted([(p, mine), (q, its)], key=lambda pair: len(pair[0]))
        out = long.expand(len(long), *value.shape).clone() if out is None else out
        out[: len(short)] += short
        return out

    gate = both[0].gate if len(both) == 1 else x.gate and y.gate
    root = both[0].root if both[-1].root is both[0].root else None
    bilinear = any(b.bilinear for b in both)
    return Parts(value, parts, ledger, gate=gate, bilinear=bilinear, root=root, fresh=True)
