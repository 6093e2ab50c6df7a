"""Which columns of a table hold the samples and their labels."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan
from numbers import Number
from typing import Any

from rc_probe.hooks.errors import RcProbeError
from rc_probe.results.words import THINGS

from .delimited import is_number
from .read_once import Opened
from .sounds import is_sound
from .table_files import Record

HALF = re.compile("[\ud800-\udfff]")
COLUMNS = {
    "text": ("text", "sentence", "content", "document", "article", "body", "review", "prompt"),
    "image": ("image", "img", "photo", "picture"),
    "audio": ("audio", "sound", "speech", "recording"),
}


@dataclass(frozen=True)
class Wanted:
    """What to take of a source, and the errors for what it has not."""

    modality: str
    column: str | None
    label_column: str | None

    def no_columns(self, where: str) -> None:
        """For a source that is no table."""
        folders = ", or name a folder of folders and give --label-column folder"
        for name, todo in (
            (self.column, "Leave --column out"),
            (self.label_column, "Leave --label-column out" + (folders if self.modality != "text" else "")),
        ):
            if name:
                raise RcProbeError(f"there are no columns here, so no {name!r}", where=where, todo=todo)

    def label(self, row: Record) -> Any:
        names = self.label_names(row)
        values = tuple(_cell(row.get(name)) for name in names)
        return None if not names else values[0] if len(names) == 1 else values

    def label_names(self, row: Record) -> list[str]:
        """One, or two with a comma between; none without a label column."""
        if not self.label_column:
            return []
        return [self.label_column] if self.label_column in row else self.label_column.split(",")


def class_names(dataset: Any, wanted: Wanted) -> tuple[str, ...]:
    """What the dataset calls its labels 0, 1, …"""
    feature = (getattr(dataset, "features", None) or {}).get(wanted.label_column)
    return tuple(getattr(feature, "names", None) or ())


def opened_rows(rows: Iterable[Record], wanted: Wanted, source: str, **more: Any) -> Opened:
    """The (sample, label) of each row; `more` are further fields of Opened."""
    stream = iter(rows)
    first = next(stream, None)
    if first is None:
        return Opened(source, iter(()), **more)
    labels = wanted.label_names(first)
    for label in labels:
        _check_name(label, first, source)
    note, digits = "", False
    if wanted.column:
        name, digits = _check_name(wanted.column, first, source), wanted.modality == "text"
    else:
        others = {key: value for key, value in first.items() if key not in labels}
        name = _choose(others, wanted, source)
        if len(others) > 1:
            note = f"column {name!r} was taken, of {', '.join(map(str, first))}; --column takes another"
    where = f"{source}, column {name!r}"
    pairs = (
        (checked(_spelt(row.get(name), digits), i, wanted.modality, where), wanted.label(row))
        for i, row in enumerate(itertools.chain([first], stream))
    )
    return Opened(source, pairs, column=name, note=note, **more)


def _spelt(value: Any, digits: bool) -> Any:
    """Numbers of a column that was asked for are texts, too."""
    number = digits and isinstance(value, Number) and value == value  # noqa: PLR0124 - not NaN
    return str(value) if number else value


def _cell(value: Any) -> Any:
    """The value of a cell; None where it is empty."""
    return None if value == "" or (isinstance(value, float) and isnan(value)) else value


def _choose(row: Record, wanted: Wanted, source: str) -> str:
    """The column of `row` that has a usual name, or the only one that fits."""
    modality = wanted.modality
    names = [str(name) for name in row]
    usual = [name for name in COLUMNS[modality] if name in names]
    fitting = [str(name) for name, value in row.items() if _is(value, modality) and not _digits(value)]
    if not usual and len(fitting) != 1:
        what = f"{'several columns' if fitting else 'no column'} of {THINGS[modality]}"
        raise RcProbeError(what, where=source, todo=f"Choose one with --column. {_there(names)}")
    return usual[0] if usual else fitting[0]


def _digits(value: Any) -> bool:
    return isinstance(value, str) and is_number(value)


def _check_name(column: str, row: Record, source: str) -> str:
    names = [str(name) for name in row]
    if column not in names:
        near = difflib.get_close_matches(column, names, 1)
        todo = f"Did you mean {near[0]!r}? {_there(names)}" if near else _there(names)
        raise RcProbeError(f"no column {column!r}", where=source, todo=todo)
    return column


def _there(names: list[str]) -> str:
    return f"The columns are {', '.join(names)}"


def _is(value: Any, modality: str) -> bool:
    if modality == "audio":
        return is_sound(value)
    return (
        isinstance(value, str) if modality == "text" else hasattr(value, "convert") and hasattr(value, "size")
    )


def checked(value: Any, index: int, modality: str, where: str) -> Any:
    """The value of a row, a text, an image or a sound; a missing text is an empty one."""
    if modality == "text" and (value is None or (isinstance(value, float) and isnan(value))):
        return ""
    if not _is(value, modality):
        what = f"row {index} is a {type(value).__name__}, and the model takes {THINGS[modality]}"
        raise RcProbeError(what, where=where, todo="Choose another --column or other data")
    if modality == "text" and HALF.search(value):
        what = f"row {index} holds half a character (a lone surrogate), which no tokenizer takes"
        raise RcProbeError(what, where=where, todo="Repair the text")
    return value
