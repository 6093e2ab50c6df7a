"""Tensors of split arithmetic: the mean token and the residual apart.

An operation without a rule gives a `Lost` tensor: plain numbers that remember the operation's name. A lost branch that
is switched off does no harm; one that reaches the stream is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.operator_rules import Rule, Rules, Traced, become

NO_RULE = "Nothing below the float floor is available for this model"
_LEAKS = frozenset(("numpy", "tolist", "array"))  # values that would leave unmarked


class _Exact(Traced):
    """A tensor of split arithmetic, float64."""

    arithmetic = "split arithmetic"
    refused = NO_RULE

    @classmethod
    def _operate(cls, func: Any, name: str, key: str, in_place: bool, args: Any, kwargs: Any) -> Any:
        if key in _LEAKS or (in_place and not isinstance(args[0], Traced)) or "out" in kwargs:
            raise RcProbeError(f"`{name}` takes the stream out of split arithmetic", todo=NO_RULE)
        function = _find(key, tree_leaves((args, kwargs)))
        out = NotImplemented if function is None else function(func, *args, **kwargs)
        if out is NotImplemented:
            out = _lose(func, name, args, kwargs)
        if in_place and not isinstance(out, Traced):
            out = Lost(args[0].dense(), name)  # returns nothing; the numbers are of no use any more
        return become(args[0], out) if in_place else out


class Split(_Exact):
    """X = centre + residual, float64 (..., T, ...): tokens on `axis` (negative), centre of size 1 there.

    A centre of full size holds terms that depend on the position (rotary embeddings). `source` is what
    entered the last weight matrix and the matrix's number, as long as it was only moved and scaled since.
    """

    center: Tensor
    residual: Tensor
    axis: int
    source: tuple[int, Split] | None

    @staticmethod
    def __new__(cls, center: Tensor, residual: Tensor, axis: int = -2) -> Split:
        shape = torch.broadcast_shapes(center.shape, residual.shape)
        axis = axis if axis < 0 else axis - len(shape)
        self: Split = cls._wrap(residual, shape)
        tokens = center.shape[axis] if center.ndim >= -axis else 1
        self.center = center.expand(*shape[:axis], tokens, *shape[len(shape) + axis + 1 :])
        self.residual, self.axis, self.source = residual.expand(shape), axis, None
        return self

    @staticmethod
    def of(x: Tensor, axis: int = -2, mask: Tensor | None = None) -> Split:
        """Split a plain stream at the mean of its real tokens. x (..., T, ...), mask (T,) bool."""
        x = x.double()
        return Split(torch.zeros_like(x.narrow(axis, 0, 1)), x, axis).recentred(mask)

    @property
    def uniform(self) -> bool:
        """The centre is the same for all tokens."""
        return self.center.shape[self.axis] == 1

    def dense(self) -> Tensor:
        return self.center + self.residual

    def recentred(self, mask: Tensor | None = None) -> Split:
        """The same stream, the mean of the (real) tokens' residual moved to the centre."""
        real = self.residual
        if mask is not None:
            real = real.index_select(self.axis, mask.nonzero()[:, 0])
        mean = real.mean(self.axis, keepdim=True)
        return Split(self.center + mean, self.residual - mean, self.axis)


class Rows(_Exact):
    """Scores or patterns (..., T, T): a row common to all queries (..., 1, T), and what each adds to it.

    `common` None: there is no common row (causal mask, rotary or relative positions), `rest` is all.
    Scores are known up to a constant per row, unless `whole`. `query` and `key` are what gave them.
    """

    common: Tensor | None
    rest: Tensor
    query: Split
    key: Split
    whole: bool

    @staticmethod
    def __new__(cls, common: Tensor | None, rest: Tensor, query: Split, key: Split) -> Rows:
        self: Rows = cls._wrap(rest, rest.shape)
        self.common, self.rest, self.query, self.key = common, rest, query, key
        self.whole = common is None
        return self

    def dense(self) -> Tensor:
        return self.rest if self.common is None else self.common + self.rest

    def like(self, common: Tensor | None, rest: Tensor) -> Any:
        """The same kind of rows, further on."""
        new = type(self)(common, rest, self.query, self.key)
        new.__dict__ = {**self.__dict__, **new.__dict__, "whole": self.whole}
        return new


class Scores(Rows):
    """Attention scores before the softmax."""


class Pattern(Rows):
    """Attention patterns P (rows sum to 1): the common row q, and P - 1 q^T. `scores` gave them."""

    scores: Scores


class Lost(_Exact):
    """Plain numbers that came through an operation without a rule, `op`."""

    value: Tensor
    op: str

    @staticmethod
    def __new__(cls, value: Tensor, op: str) -> Lost:
        self: Lost = cls._wrap(value, value.shape)
        self.value, self.op = value, op
        return self

    def dense(self) -> Tensor:
        return self.value


RULES = Rules(Split)  # filled by the package from its files of rules


def _find(key: str, leaves: list[Any]) -> Rule | None:
    """Rules for lost operands come before those for scores, these before those for streams."""
    kind = next((k for k in (Lost, Rows) if any(isinstance(a, k) for a in leaves)), Split)
    return RULES.get((kind, key))


def shared(p: Any, axis: int) -> Any:
    """A plain operand in float64, of size 1 on `axis` if it is the same all along it."""
    p = double(p)
    if isinstance(p, Tensor) and p.ndim >= -axis and p.shape[axis] > 1:
        first = p.narrow(axis, 0, 1)
        return first if bool((p == first).all()) else p
    return p


def double(a: Any) -> Any:
    """A plain operand as float64: float32 weights are used exactly."""
    return a.double() if isinstance(a, Tensor) and a.is_floating_point() else a


def _lose(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    op = next((a.op for a in tree_leaves((args, kwargs)) if isinstance(a, Lost)), name)
    args, kwargs = tree_map(lambda a: double(a.dense() if isinstance(a, Traced) else a), (args, kwargs))
    return tree_map_only(Tensor, lambda t: Lost(t, op), func(*args, **kwargs))
