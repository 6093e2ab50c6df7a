"""Which heads each path keeps: applied to what an attention op returns, in the layout of that op.

Where only the softmax of an attention op can be met, the op returns the pattern itself, which is held and has no
parts. The choice then goes on with the pattern, as a label of the head on each of its entries, until it meets values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.operator_rules import Traced, become
from rc_probe.hooks.structure.structure import INTERFACE, AttentionOp
from rc_probe.hooks.structure.tape import SDPA

from .parts import NO_PARTS, Parts, Unknown, out_of_place

PRODUCTS = frozenset(("matmul", "rmatmul", "bmm", "einsum"))
MOVES = frozenset(
    """view reshape flatten unflatten transpose permute swapaxes movedim unsqueeze squeeze getitem select narrow
    expand expand_as contiguous clone detach T mT t view_as reshape_as""".split()  # noqa: SIM905
)
EACH = frozenset(  # entry by entry, so that each stays what its head made
    """dropout mul rmul imul div truediv masked_fill nan_to_num clamp to type type_as float double
    cpu cuda""".split()  # noqa: SIM905
)


def kept_heads(op: AttentionOp, chosen: Tensor) -> Callable[[Tensor], Tensor]:
    """The edit of an op's output that keeps the heads chosen. chosen (draws, heads) bool: one row for each channel in turn."""
    if op.via not in (INTERFACE, SDPA):

        def mark(x: Tensor) -> Tensor:
            marked: Tensor = Choice(x, _labels(x, op.heads), chosen)
            return marked

        return mark

    def edit(x: Tensor) -> Tensor:
        if not isinstance(x, Parts):
            return x
        axis = 2 if op.via == INTERFACE else 1  # (batch, tokens, heads, dim) or (batch, heads, tokens, dim)
        labels = _labels(x, op.heads) if axis == 1 else _along(x, op.heads, axis)
        return x.made(lambda parts: keep(parts, labels, chosen))

    return edit


def _labels(x: Tensor, heads: int) -> Tensor:
    """The head of each entry of (batch, heads, tokens, …) or (batch · heads, tokens, …), numbered from 0."""
    if x.ndim == 4:
        return _along(x, heads, 1)
    return torch.arange(x.shape[0], device=x.device).remainder(heads)[:, None, None].expand(x.shape)


def _along(x: Tensor, heads: int, axis: int) -> Tensor:
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    return torch.arange(heads, device=x.device).reshape(shape).expand(x.shape)


def keep(parts: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
    """Parts (channels, …) where the heads of the labels (…) are chosen, and zeros elsewhere."""
    for axis in range(labels.ndim):
        first = labels.narrow(axis, 0, 1)
        labels = first if bool((labels == first).all()) else labels
    mask = chosen.to(parts.device, parts.dtype)[:, labels]  # (draws, …)
    each: Tensor = parts.unflatten(0, (-1, len(mask))) * mask
    return each.flatten(0, 1)


class Choice(Traced):
    """A pattern, held, whose heads are chosen by `chosen` (draws, heads). labels: the head of each entry, as the pattern."""

    arithmetic = "path arithmetic"
    refused = NO_PARTS
    leads = True
    value: Tensor
    labels: Tensor
    chosen: Tensor

    @staticmethod
    def __new__(cls, value: Tensor, labels: Tensor, chosen: Tensor) -> Choice:
        self: Choice = cls._wrap(value, value.shape)
        self.value, self.labels, self.chosen = value, labels, chosen
        return self

    def dense(self) -> Tensor:
        return self.value

    @classmethod
    def _operate(cls, func: Any, name: str, key: str, in_place: bool, args: Any, kwargs: Any) -> Any:
        run = out_of_place(func, name, key) if in_place else func
        out = _through(run, name, key, args, kwargs)
        return become(args[0], out) if in_place and isinstance(out, Traced) else out


def _through(func: Any, name: str, key: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the pattern, and on what tells its heads apart."""

    def run(replace: Callable[[Any], Any], function: Any = func) -> Any:
        new_args, new_kwargs = tree_map(replace, (args, kwargs))
        return function(*new_args, **new_kwargs)

    choice = next(a for a in tree_leaves((args, kwargs)) if isinstance(a, Choice))
    out = run(lambda a: a.value if isinstance(a, Choice) else a)
    if isinstance(out, Parts):
        if key not in PRODUCTS:
            return Unknown(out.value, name)
        labels = _of_product(run)
        return out.made(lambda parts: keep(parts, labels, choice.chosen))
    if not isinstance(out, Tensor) or not out.is_floating_point():
        return out
    if key in MOVES:
        same = Tensor.reshape if func is Tensor.view else func  # labels have strides of their own
        return Choice(out, run(lambda a: a.labels if isinstance(a, Choice) else a, same), choice.chosen)
    if key in EACH and out.shape == choice.shape:
        return Choice(out, choice.labels, choice.chosen)
    return Unknown(out, name)


def _of_product(run: Callable[[Callable[[Any], Any]], Any]) -> Tensor:
    """The head of each entry of a product of pattern and values: the mean over what it sums, which has to be one head's."""

    def weighed(power: int) -> Tensor:
        def operand(a: Any) -> Any:
            if isinstance(a, Choice):
                return a.labels.double() ** power
            return torch.ones(a.shape, dtype=torch.float64, device=a.device) if isinstance(a, Tensor) else a

        out: Tensor = run(operand)
        return out

    count = weighed(0)
    labels, squares = weighed(1) / count, weighed(2) / count
    if not torch.allclose(labels.square(), squares, atol=1e-6):
        raise RcProbeError("its attention adds up heads that a path would tell apart", todo=NO_PARTS)
    return labels.round().long()
