"""Samples read once for several runs: inside `kept()`, what a source gave is not read again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Opened = tuple[str, Iterator[Any]]  # name of a source, its samples in order


class _Kept:
    """A stream that can be read from its start again, as far as it was read; it goes on where it stopped."""

    def __init__(self, source: str, stream: Iterator[Any]) -> None:
        self.source, self.stream = source, stream
        self.items: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        place = 0
        while True:
            if place == len(self.items):
                try:
                    self.items.append(next(self.stream))
                except StopIteration:
                    return
            yield self.items[place]
            place += 1


_KEPT: ContextVar[dict[tuple[Any, ...], _Kept] | None] = ContextVar("kept", default=None)


@contextmanager
def kept() -> Iterator[None]:
    """Inside, each source is opened once for all runs; its rows stay in memory, as many as were asked for."""
    before = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(before)


def read(opening: Callable[..., Opened], spec: Any, modality: str, column: str | None) -> Opened:
    """What `opening(spec, modality, column)` gives, or gave before inside `kept()`."""
    found = _KEPT.get()
    if found is None or not (spec is None or isinstance(spec, str)):
        return opening(spec, modality, column)
    key = (spec, modality, column)
    if key not in found:
        found[key] = _Kept(*opening(spec, modality, column))
    return found[key].source, iter(found[key])
