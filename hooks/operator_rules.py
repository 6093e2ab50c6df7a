"""Tensors known by their parts, how the model's operations find the rules for them, and the scores of attention.

A `Traced` passes for a tensor but holds no data: every operation on it goes to the rules of its kind of arithmetic
(`split`, `frozen`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import RcProbeError

# Questions about shape and kind: the wrapper itself knows the answer.
META = frozenset(
    """shape dtype device ndim layout is_cuda is_cpu is_mps is_sparse is_quantized is_meta is_nested is_leaf
    is_complex is_contiguous is_floating_point is_inference requires_grad grad_fn itemsize element_size size
    dim ndimension numel nelement stride get_device len""".split()  # noqa: SIM905
)
_IN_PLACE = frozenset(("__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__setitem__"))


class Traced(Tensor):
    """A tensor that is known by its parts."""

    arithmetic: str  # its name, in errors
    refused: str  # what an error says to do
    leads = False  # its own way with an operation comes before that of other kinds

    @classmethod
    def _wrap(cls, like: Tensor, shape: torch.Size) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def dense(self) -> Tensor:
        """The plain tensor."""
        raise NotImplementedError

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, key, in_place = called(func)
        if key in META:
            return torch._C._disabled_torch_function_impl(func, types, args, kwargs)
        return cls._operate(func, name, key, in_place, args, kwargs)

    @classmethod
    def _operate(cls, func: Any, name: str, key: str, in_place: bool, args: Any, kwargs: Any) -> Any:
        """What an operation on such tensors gives; `key` names its rule."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RcProbeError(f"`{func}` got past the rules of {cls.arithmetic}", todo=cls.refused)


Rule = Callable[..., Any]


class Rules(dict[tuple[type[Traced], str], Rule]):
    """Rules by the kind of tensor and the operation's name; torch's, without underscores at their ends.

    >>> rule = Rules(Parts)                           # doctest: +SKIP
    >>> @rule("to type")                              # doctest: +SKIP
    ... def _cast(func, x, *args, **kwargs): ...      # called with the operation and its arguments

    A rule returns NotImplemented where there is none for these operands.
    """

    def __init__(self, kind: type[Traced]) -> None:
        self.kind = kind

    def __call__(self, names: str, on: type[Traced] | None = None) -> Callable[[Rule], Rule]:
        """Enter the decorated function for these operations on tensors of the kind `on`."""

        def enter(function: Rule) -> Rule:
            self.update({(on or self.kind, name): function for name in names.split()})
            return function

        return enter


def called(func: Any) -> tuple[str, str, bool]:
    """An operation's name, the key of its rule, and whether it writes into its first operand."""
    name = func.__name__ if func.__name__ != "__get__" else func.__self__.__name__
    return name, name.strip("_"), name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def attention_scores(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The scores (…, T, S) of scaled_dot_product_attention, whose arguments these are; masked ones are -inf.

    query (…, T, d), key (…, S, d), with as many heads; plain tensors, or ones with rules for what is done here.
    """
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def attention_pattern(scores: Tensor) -> Tensor:
    """Their softmax over keys; a query that may attend to nothing has zeros."""
    return scores.softmax(-1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0)


def become(target: Any, out: Traced) -> Any:
    """In place: the object itself turns into the result, for whoever else holds it."""
    target.__class__ = type(out)
    target.__dict__.clear()
    target.__dict__.update(out.__dict__)
    return target
