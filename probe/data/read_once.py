"""Samples read once for several runs: inside `reading_once()`, what a source gave is not read again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .columns import Wanted

Key = tuple[str | None, Hashable]


@dataclass(frozen=True)
class Opened:
    """A source's name, its (sample, label) in order, and the names of its labels."""

    source: str
    stream: Iterator[tuple[Any, Any]]
    classes: tuple[str, ...] = ()
    column: str | None = None  # that the samples stand in
    note: str = ""  # for the reader
    untyped: bool = False  # every label is a text, as files have them


class _Replayed:
    """A stream that can be read from its start again, as far as it was read; it goes on where it stopped."""

    def __init__(self, opened: Any) -> None:
        self.opened, self.stream = opened, opened.stream
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


_SOURCES: ContextVar[dict[Key, _Replayed] | None] = ContextVar("read_once", default=None)


@contextmanager
def reading_once() -> Iterator[None]:
    """Inside, each source is opened once for all runs; its rows stay in memory, as many as were asked for."""
    before = _SOURCES.set({})
    try:
        yield
    finally:
        _SOURCES.reset(before)


def read(opening: Callable[[Any, Wanted], Opened], spec: Any, wanted: Wanted) -> Opened:
    """What `opening(spec, wanted)` gives, or gave before inside `reading_once()`."""
    found = _SOURCES.get()
    if found is None or not (spec is None or isinstance(spec, str)):
        return opening(spec, wanted)
    key = (spec, wanted)
    if key not in found:
        found[key] = _Replayed(opening(spec, wanted))
    again: Opened = replace(found[key].opened, stream=iter(found[key]))
    return again
