"""What modules returned in one pass: kept as copies, to be returned again in another pass on the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PLAIN = (type(None), bool, int, float, str)


class NotRecordable(Exception):  # noqa: N818 - a signal, not an error
    """An output holds something other than tensors, such as a cache that grows."""


def copied(value: Any, take: Callable[[Tensor], Any] = torch.clone) -> Any:
    """Nested tuples, lists and dicts (a ModelOutput is one) with `take` of each tensor, one tensor once."""
    return _copied(value, take, {})


def _copied(value: Any, take: Callable[[Tensor], Any], seen: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = take(value)
        return seen[id(value)]
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, dict):
        items = {key: _copied(item, take, seen) for key, item in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if isinstance(value, tuple | list):
        parts = [_copied(item, take, seen) for item in value]
        named = hasattr(value, "_fields")
        return type(value)(*parts) if named else type(value)(parts)
    raise NotRecordable(type(value).__name__)


def own(value: Any) -> Any:
    """What one pass may write into: a copy of what holds more than tensors, such as a filled cache."""
    try:
        copied(value, lambda x: x)
    except NotRecordable:
        return copy.deepcopy(value)
    return value


def filled(value: Any) -> bool:
    """Whether it is a cache that holds keys and values already."""
    return hasattr(value, "get_seq_length") and int(value.get_seq_length()) > 0


def size_of(value: Any) -> int:
    """Bytes of the tensors in it."""
    total = 0

    def add(x: Tensor) -> Tensor:
        nonlocal total
        total += x.numel() * x.element_size()
        return x

    copied(value, add)
    return total


def form_of(value: Any) -> Any:
    """An output of the same form that takes no memory."""
    return copied(value, lambda x: x.new_zeros(()).expand(x.shape))


def zeros_like(form: Any) -> Any:
    """Zeros of that form, for callers that remove them again."""
    return copied(form, torch.zeros_like)
