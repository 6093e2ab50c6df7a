"""Split arithmetic of attention: scores with a row common to all queries, patterns, their products.

Scores of queries cq + Rq and keys ck + Rk are cq Rk^T, common to all rows, plus E = Rq Rk^T, plus what is
constant along a row and cancels in the softmax ("Attention is not all you need", Dong et al. 2021,
section 2). So P - 1 q^T is of second order in the residual, and times the values' residual of third.

Where the scores have no row common to all queries (causal mask, rotary or relative positions), patterns
differ from row to row by themselves, and P R is right as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rc_probe.hooks.operator_rules import Rules, Traced, attention_scores
from rc_probe.hooks.undo import undoing

from .tensors import Pattern, Rows, Scores, Split, double, shared

rule = Rules(Split)

MASKED = -1e30  # a masked score: no weight, and no NaN in a row that is masked throughout


@dataclass(frozen=True)
class Attention:
    """One attention as it was run: queries, keys, values ((1,) H, T, d), and the patterns ((1,) H, T, T)."""

    query: Split
    key: Split
    value: Split
    pattern: Pattern


@dataclass
class Observer:
    """What Splits run through in `watching`: attentions, and the number of weight matrices so far."""

    seen: list[Attention] = field(default_factory=list)
    result: Callable[[Split], Split] | None = None
    token: Callable[[int, Split], Split] | None = None
    projections: int = 0


_observers: list[Observer] = []


@contextmanager
def watching(
    result: Callable[[Split], Split] | None = None, token: Callable[[int, Split], Split] | None = None
) -> Iterator[Observer]:
    """Collect the attentions that Splits run through, and change what goes on.

    result: replaces each attention's result; token(i, x): replaces what enters the i-th weight matrix.
    """
    observer = Observer(result=result, token=token)

    def back() -> None:
        _observers[:] = [each for each in _observers if each is not observer]

    with undoing(back):
        _observers.append(observer)
        yield observer


def enter_projection(x: Split) -> tuple[Split, int]:
    """Tell the observers that `x` meets a weight matrix: what to take in its place, and its number."""
    number = -1
    for observer in _observers:
        number = observer.projections
        observer.projections += 1
        x = x if observer.token is None else observer.token(number, x)
    return x, number


def scores(query: Split, key: Split) -> Scores:
    """query (..., T, d) times key (..., d, T), less what is constant along a row."""
    if query.uniform and key.uniform:
        return Scores(query.center @ key.residual, query.residual @ key.residual, query, key)
    return Scores(None, query.dense() @ key.dense(), query, key)


@rule("softmax", on=Rows)
def _softmax(func: Any, input: Any, dim: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """P - 1 q^T = (u - q S)/(1 + S) with u = q expm1(E), S = sum u; plainly where E is not small."""
    if not isinstance(input, Scores) or dim not in (-1, input.ndim - 1):
        return NotImplemented
    common, e = input.common, input.rest
    if common is None:
        out = Pattern(None, torch.softmax(e, -1), input.query, input.key)
    else:
        q = torch.softmax(common, -1)
        small = e.abs().amax(-1, keepdim=True) < 1
        u = q * torch.expm1(e)
        total = u.sum(-1, keepdim=True)
        rest = torch.where(small, (u - q * total) / (1 + total), torch.softmax(common + e, -1) - q)
        out = Pattern(q, rest, input.query, input.key)
    out.scores = input
    return out


@rule("matmul bmm", on=Rows)
def _matmul(func: Any, p: Any, v: Any) -> Any:
    if not (isinstance(p, Pattern) and isinstance(v, Split) and v.axis == -2 and v.uniform):
        return NotImplemented
    center = v.center if p.common is None else v.center + p.common @ v.residual
    out = Split(center, p.rest @ v.residual, -2).recentred()
    for observer in _observers:
        observer.seen.append(Attention(p.query, p.key, v, p))
        out = out if observer.result is None else observer.result(out)
    return out


@rule("add radd iadd", on=Rows)
def _add(func: Any, x: Any, p: Any, *, alpha: Any = 1) -> Any:
    """A mask or bias; one that is the same for all queries stays in the common row."""
    x, p = (x, p) if isinstance(x, Traced) else (p, x)
    if not isinstance(x, Scores) or isinstance(p, Traced) or alpha != 1:
        return NotImplemented
    p = shared(torch.as_tensor(p, device=x.device), -2).clamp(min=MASKED)
    if p.ndim >= 2 and p.shape[-2] > 1:
        return x.like(None, x.dense() + p)
    return x.like(None, x.rest + p) if x.common is None else x.like(x.common + p, x.rest)


@rule("masked_fill", on=Rows)
def _masked_fill(func: Any, x: Any, mask: Any, value: Any) -> Any:
    if not isinstance(x, Scores) or isinstance(mask, Traced) or isinstance(value, Traced) or value > -1e4:
        return NotImplemented
    return x + torch.zeros(mask.shape, dtype=torch.float64, device=mask.device).masked_fill(mask, MASKED)


@rule("where", on=Rows)
def _where(func: Any, keep: Any, x: Any = None, value: Any = None) -> Any:
    return _masked_fill(func, x, ~keep, value) if isinstance(x, Scores) else NotImplemented


@rule("max maximum clamp clip", on=Rows)
def _not_below(func: Any, x: Any, low: Any = None, **named: Any) -> Any:
    """Scores kept above the least float, which they are."""
    low = named.pop("min", low)
    plain = isinstance(low, Tensor | float | int) and not isinstance(low, Traced)
    return x if isinstance(x, Scores) and plain and not named and bool(low < -1e30) else NotImplemented


@rule("mul rmul imul multiply", on=Rows)
def _mul(func: Any, x: Any, y: Any) -> Any:
    x, y = (x, y) if isinstance(x, Traced) else (y, x)
    return _scaled(x, y, torch.mul)


@rule("div idiv truediv itruediv true_divide divide", on=Rows)
def _div(func: Any, x: Any, y: Any) -> Any:
    return _scaled(x, y, torch.div)


def _scaled(x: Any, y: Any, by: Callable[[Any, Any], Tensor]) -> Any:
    """Scores times or over one number per matrix. (A pattern's rows would no longer sum to 1.)"""
    y = double(y)
    varies = isinstance(y, Tensor) and any(n > 1 for n in y.shape[-2:])
    if not isinstance(x, Scores) or isinstance(y, Traced) or varies:
        return NotImplemented
    return x.like(None if x.common is None else by(x.common, y), by(x.rest, y))


@rule("tanh", on=Rows)
def _tanh(func: Any, x: Any) -> Any:
    """Soft caps, where the scores are known in full."""
    return x.like(None, torch.tanh(x.rest)) if isinstance(x, Scores) and x.whole else NotImplemented


@rule("view reshape unsqueeze squeeze", on=Rows)
def _move(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    func = Tensor.reshape if func is Tensor.view else func
    rest = func(x.rest, *args, **kwargs)
    if rest.shape[-2:] != x.shape[-2:]:
        return NotImplemented
    common = None if x.common is None else func(x.common.expand(x.shape), *args, **kwargs)[..., :1, :]
    return x.like(common, rest)


@rule("to type type_as float double half bfloat16 contiguous clone detach data", on=Rows)
def _same(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return x.like(x.common, x.rest) if isinstance(x, Rows) else NotImplemented


@rule("dropout", on=Rows)
def _dropout(func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return NotImplemented if training and p else _same(func, input)


@rule("scaled_dot_product_attention")
def _sdpa(
    func: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if not all(isinstance(a, Split) and a.axis == -2 for a in (query, key, value)) or dropout_p:
        return NotImplemented
    if enable_gqa:
        key, value = (a.repeat_interleave(query.shape[-3] // a.shape[-3], -3) for a in (key, value))
    return torch.softmax(attention_scores(query, key, attn_mask, is_causal, scale), -1) @ value
