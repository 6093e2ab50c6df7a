"""What samples hold, as a short text: two runs on the same samples have the same digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def digest_of(items: Iterable[Any]) -> str | None:
    """16 hexadecimal digits of the SHA-256 of texts, arrays and the files of images and sounds, in their order.

    None where a sample is of another kind (a PIL image would have to be decoded and stay in memory).
    """
    total = hashlib.sha256()
    try:
        for item in items:
            _add(total, item)
    except (TypeError, OSError):
        return None
    return total.hexdigest()[:16]


def _add(total: Any, item: Any) -> None:
    """Each part with its kind and length before it, so that no two lists of samples read the same."""
    if isinstance(item, Path):
        with item.open("rb") as file:
            content: bytes | memoryview = hashlib.file_digest(file, "sha256").digest()
    elif isinstance(item, str):
        content = item.encode("utf-8", "surrogatepass")
    elif isinstance(item, bytes):
        content = item
    elif isinstance(item, np.ndarray):
        content = f"{item.dtype.str}{item.shape}".encode() + np.ascontiguousarray(item).tobytes()
    elif isinstance(item, bool | int | float | None):
        content = repr(item).encode()
    elif isinstance(item, dict | tuple | list):
        parts = sorted(item.items()) if isinstance(item, dict) else item
        total.update(f"{len(item)} of ".encode())
        for part in parts:
            _add(total, part)
        content = b""
    else:
        raise TypeError(type(item).__name__)
    kind = "Path" if isinstance(item, Path) else type(item).__name__
    total.update(f"{kind} {len(content)} ".encode())
    total.update(content)
