"""Views: what is written into one shows in the tensor that it is a view of.

Parts share no memory. So the result of an operation that gave a view remembers what it is a view of, and by
which places; when it is written into, those places of the whole are written, too. The other way round, views
made before the whole is written into stay as they were; the plain pass tells such models (probe/paths/decompose.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Origin:
    """What a tensor is a view of. places: of its entries in the whole, counted over that; made when they are needed."""

    whole: Callable[[], Any]
    places: Callable[[], Tensor]


def view_of(
    whole: Any, value: Tensor, out: Tensor, again: Callable[[Tensor], Any], index: int
) -> Origin | None:
    """The origin of the `index`-th result `out` of an operation on `whole`, if it shares the memory of its value.

    again: the same operation on another tensor of that shape
    """
    if out.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
        return None

    def places() -> Tensor:
        found: Tensor = tree_leaves(again(_counted(value)))[index]
        return found.long()

    return Origin(weakref.ref(whole), places)


def view_of_plain(target: Tensor) -> Origin | None:
    """The origin of a plain tensor."""
    base = target._base
    if base is None or type(base) is not Tensor or not base.is_contiguous():
        return None
    size, stride, offset = target.size(), target.stride(), target.storage_offset() - base.storage_offset()
    return Origin(lambda: base, lambda: _counted(base).as_strided(size, stride, offset))


def _counted(x: Tensor) -> Tensor:
    return torch.arange(x.numel(), device=x.device).reshape(x.shape)


def put(x: Tensor, places: Tensor, item: Tensor) -> Tensor:
    """`x` with the entries of `item` at these places."""
    return x.reshape(-1).index_put((places.reshape(-1),), item.reshape(-1)).reshape(x.shape)
