"""Arithmetic on a stream that is kept as a sum of parts: X = S_0 + S_1 + …, one part a channel.

Attention patterns, norm scales and activation gates are held at what the whole stream makes of them. The
network is then linear in its input, and each part goes through it by itself. The model's own code runs on
`Parts`; its value is computed once, by the model's own operations, and the parts follow by rules
(parts_moves.py, parts_maps.py, parts_frozen.py), each of which keeps their sum equal to the value.

Parts are computed when they are asked for: queries, keys and scores, which only give patterns, never are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.operator_rules import Rules, Traced, become
from rc_probe.hooks.undo import unseen

NO_PARTS = "The paths of this model cannot be told apart"


@dataclass
class Ledger:
    """Which channel is what. Channels: first `fixed` ones, then `group` for length 0, for length 1 …

    constant: the channel that takes what does not come from the stream (biases), None to drop it: an index below `fixed`,
        or fixed + slot for a slot of length 0
    longest: lengths above it share one more group; None keeps every length apart
    """

    fixed: int
    group: int = 0
    constant: int | None = None
    longest: int | None = None

    def with_constant(self, parts: Tensor, constant: Any) -> Tensor:
        """Fresh `parts` with a constant added in place, (channels, …)."""
        if self.constant is not None and constant is not None:
            parts[self.constant] += constant
        return parts

    def longer(self, parts: Tensor) -> Tensor:
        """Every path is one hop longer: the groups of `parts` move by one."""
        if not self.group:
            return parts
        start = self.fixed + self.group  # of what comes from length 0
        most = len(parts) if self.longest is None else self.fixed + self.group * (self.longest + 1)
        out = parts.new_empty(min(len(parts), most) + self.group, *parts.shape[1:])
        out[: self.fixed] = parts[: self.fixed]
        out[self.fixed : start] = 0
        out[start:] = parts[self.fixed : len(out) - self.group]
        if len(parts) > most:
            out[-self.group :] += parts[most:]
        return out


class _Kept:
    """Parts that are computed when they are asked for, and kept where more than one operation may ask.

    operands: plain tensors, and their versions at that time
    fresh: what computes them gives a tensor that nothing else holds
    readers: how many operations were made of them
    """

    def __init__(self, parts: Tensor | Callable[[], Tensor], fresh: bool = False) -> None:
        self.parts, self.fresh = parts, fresh
        self.operands: list[tuple[Tensor, int]] = []
        self.readers = 0

    def get(self) -> Tensor:
        if not isinstance(self.parts, Tensor):
            self.parts = self._compute(self.parts)
            self.operands.clear()
        return self.parts

    def take(self) -> tuple[Tensor, Tensor | None]:
        """The parts, and where their only reader may write: into these. Large buffers are not made again and again."""
        if isinstance(self.parts, Tensor) or not self.fresh or self.readers > 1:
            return self.get(), None
        parts = self._compute(self.parts)
        return parts, parts

    def _compute(self, parts: Callable[[], Tensor]) -> Tensor:
        if any(tensor._version != version for tensor, version in self.operands):
            raise RcProbeError(
                "the model has written into a tensor that the stream was computed with", todo=NO_PARTS
            )
        with torch.no_grad(), unseen():
            return parts()


class Parts(Traced):
    """A tensor (…) and its parts (channels, …), which add up to it unless the ledger drops constants.

    gate: it came out of an activation, so that in a product with another it is the coefficient.
    root: what it is a function of, entry by entry: a product of two with one root is an activation.
    bilinear: it holds a product of two linear images of the stream, of which neither is a coefficient.
    """

    arithmetic = "path arithmetic"
    refused = NO_PARTS
    value: Tensor
    ledger: Ledger
    gate: bool
    bilinear: bool
    root: object
    _kept: _Kept
    origin: tuple[Tensor, Any] | None = None  # of what it is a view, and where

    @staticmethod
    def __new__(
        cls,
        value: Tensor,
        parts: Tensor | Callable[[], Tensor] | _Kept,
        ledger: Ledger,
        *,
        gate: bool = False,
        bilinear: bool = False,
        root: object = None,
        fresh: bool = False,
    ) -> Parts:
        self: Parts = cls._wrap(value, value.shape)
        self.value, self.ledger, self.gate, self.bilinear = value, ledger, gate, bilinear
        self._kept = parts if isinstance(parts, _Kept) else _Kept(parts, fresh)
        self.root = self._kept if root is None else root
        return self

    @property
    def parts(self) -> Tensor:
        return self._kept.get()

    def taken(self, like: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The parts, and a tensor to write the result into, which is of the shape of `like` and its type; or None."""
        parts, out = self._kept.take()
        like = self.value if like is None else like
        fits = out is not None and out.shape[1:] == like.shape and out.dtype == like.dtype
        return parts, out if fits else None

    def same(self) -> Parts:
        """The same numbers as another object, which stays as it is when this one is written into."""
        return Parts(
            self.value, self._kept, self.ledger, gate=self.gate, bilinear=self.bilinear, root=self.root
        )

    def made(self, parts: Callable[[Tensor], Tensor], *, fresh: bool = False) -> Parts:
        """The same value with other parts, made from these when they are asked for. fresh: in a tensor of their own."""
        kept = self._kept
        kept.readers += 1
        return Parts(self.value, lambda: parts(kept.get()), self.ledger, fresh=fresh)

    def dense(self) -> Tensor:
        return self.value

    @classmethod
    def _operate(cls, func: Any, name: str, key: str, in_place: bool, args: Any, kwargs: Any) -> Any:
        return follow(func, name, key, in_place, args, kwargs)


class Unknown(Traced):
    """Plain numbers that came from the stream through an operation without a rule, `op`."""

    arithmetic = "path arithmetic"
    refused = NO_PARTS
    value: Tensor
    op: str

    @staticmethod
    def __new__(cls, value: Tensor, op: str) -> Unknown:
        self: Unknown = cls._wrap(value, value.shape)
        self.value, self.op = value, op
        return self

    def dense(self) -> Tensor:
        return self.value

    @classmethod
    def _operate(cls, func: Any, name: str, key: str, in_place: bool, args: Any, kwargs: Any) -> Any:
        return follow(func, name, key, in_place, args, kwargs)


HELD = "rc_probe_held"  # on what came out of a sigmoid: the root of the stream there; that times this is an activation
RULES = Rules(Parts)  # filled by the package from its files of rules
FREEZING: set[str] = set()  # operations whose results are held: patterns, scales, gates, choices


def follow(func: Any, name: str, key: str, in_place: bool, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on Parts: by its rule, held, or else Unknown."""
    other: Any = next((a for a in tree_leaves((args, kwargs)) if isinstance(a, Traced) and a.leads), None)
    if other is not None:
        return other.__torch_function__(func, (), args, kwargs)
    if kwargs.get("out") is not None:
        raise RcProbeError(f"`{name}` writes the stream into a given tensor", todo=NO_PARTS)
    target = args[0] if in_place or kwargs.get("inplace") else None
    kwargs = {k: False if k == "inplace" else v for k, v in kwargs.items()}
    given = args
    args, kwargs = tree_map(_as_is, (args, kwargs))  # rules may look at it when it has been written into
    operands = [
        (a, a._version) for a in tree_leaves((args, kwargs)) if type(a) is Tensor and not a.is_inference()
    ]
    unknown = next((a.op for a in tree_leaves((args, kwargs)) if isinstance(a, Unknown)), None)
    out: Any = NotImplemented
    if in_place:
        func = out_of_place(func, name, key)
    if unknown is None and (Parts, key) in RULES:
        out = RULES[Parts, key](func, *args, **kwargs)
        for made in tree_leaves(out):
            if isinstance(made, Parts):
                made._kept.operands += operands
    if out is NotImplemented:
        out = func(*plain(args), **plain(kwargs))
        if key not in FREEZING:
            out = tree_map(lambda t: _unknown(t, unknown or name), out)
    if target is None:
        if key == "getitem" and isinstance(out, Parts):
            out.origin = (given[0], args[1])
        return out
    if isinstance(out, Tensor) and not isinstance(out, Traced):
        out = Unknown(out, unknown or name)
    return _write(target, out)


def _write(target: Tensor, out: Traced) -> Tensor:
    """The target becomes what was written into it, and so does that of which it is a view."""
    origin = getattr(target, "origin", None)
    base = None if isinstance(target, Traced) or not target._is_view() else target._base
    if base is None:
        become(target, out)
        if origin is not None:
            origin[0][origin[1]] = target
        return target
    if not base.is_contiguous():
        raise RcProbeError("the stream is written into a view of a tensor with gaps", todo=NO_PARTS)
    start = target.storage_offset() - base.storage_offset()
    places = torch.arange(base.numel(), device=base.device).as_strided(target.shape, target.stride(), start)
    become(target, out)
    written: Any = base.reshape(-1).index_put((places.reshape(-1),), target.reshape(-1)).reshape(base.shape)
    become(base, written)
    return target


def _as_is(a: Any) -> Any:
    """The same numbers as an object of our own, which stays as it is when the model writes into its own."""
    if isinstance(a, Parts):
        a._kept.readers += 1
        return a.same()
    if isinstance(a, Unknown):
        return Unknown(a.value, a.op)
    if not isinstance(a, Tensor):
        return a
    alias = a.detach()
    if hasattr(a, HELD):
        setattr(alias, HELD, getattr(a, HELD))
    return alias


def numeric(t: Any) -> bool:
    """Whether it is a tensor of numbers, not of choices."""
    return isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())


def _unknown(t: Any, op: str) -> Any:
    """Choices and counts are held; numbers that follow the stream are not known by parts."""
    return Unknown(t, op) if numeric(t) else t


def out_of_place(func: Any, name: str, key: str) -> Any:
    """The operation that gives what this one writes into its first operand."""
    if name in WRITES:
        return WRITES[name]
    plain_name = f"__{key.removeprefix('i')}__" if name.startswith("__") else key
    function = getattr(Tensor, plain_name, None)
    if function is None:
        return lambda x, *args, **kwargs: func(x.clone(), *args, **kwargs)
    return function


def set_item(x: Tensor, index: Any, item: Any) -> Tensor:
    x = x.clone()
    x[index] = item
    return x


def copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(x.dtype).expand(x.shape).clone()


WRITES = {"__setitem__": set_item, "copy_": copy, "fill_": torch.full_like}


def plain(tree: Any) -> Any:
    """Nested arguments with values in place of Parts."""
    return tree_map(lambda a: a.value if isinstance(a, Parts | Unknown) else a, tree)


def aligned(parts: Tensor, ndim: int) -> Tensor:
    """Parts (channels, …) with as many axes behind the channels as an operand of `ndim` axes has at least."""
    missing = ndim - (parts.ndim - 1)
    return parts.reshape(parts.shape[0], *[1] * missing, *parts.shape[1:]) if missing > 0 else parts


def common(parts: list[Tensor]) -> list[Tensor]:
    """As many channels in each: a path that is not there yet is zero."""
    most = max(map(len, parts))
    return [p if len(p) == most else torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in parts]
