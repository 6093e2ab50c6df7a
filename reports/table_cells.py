"""Tables for reading: cells with the number to sort by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from markupsafe import Markup

from rc_probe.results import tables
from rc_probe.results.tables import Column
from rc_probe.results.words import number


class Heading(str):
    """A heading that says what its column means when it is pointed at."""

    meaning = ""

    @classmethod
    def of(cls, column: Column) -> Self:
        made = cls(column.heading or column.name)
        made.meaning = column.meaning.replace("`", "")
        return made

    def __html__(self) -> str:
        return Markup('<span title="{}">{}</span>').format(self.meaning, str(self))


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, and the number to sort by where it is one."""

    text: str
    value: str | None = None


@dataclass(frozen=True)
class Table:
    """A table for reading. `groups` are headings over several columns: (text, columns)."""

    name: str
    caption: str
    headings: Sequence[str]
    rows: list[list[Cell]]
    groups: list[tuple[str, int]] | None = None


def cell(value: Any) -> Cell:
    """`value` for reading, with the number to sort by; a missing one is a dash and sorts last."""
    if isinstance(value, bool | np.bool_):
        return Cell("yes" if value else "no")
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return Cell("–", "")
    if isinstance(value, int | np.integer):
        return Cell(str(value), str(value))
    if isinstance(value, float | np.floating):
        return Cell(number(float(value), 3), f"{value:.6g}")
    return Cell(str(value))


def whole_table(declared: tables.Table, frame: pd.DataFrame | None) -> Table | None:
    """All of `frame`, under the headings and the title that are declared for it."""
    if frame is None or frame.empty:
        return None
    known = {column.name: Heading.of(column) for column in declared.columns}
    headings = [known.get(str(column), str(column)) for column in frame]
    whole = [c for c in frame.select_dtypes("float") if (frame[c].dropna() % 1 == 0).all()]
    frame = frame.astype(dict.fromkeys(whole, "Int64"))  # counts with missing ones among them
    rows = [[cell(value) for value in row] for row in frame.itertuples(index=False, name=None)]
    return Table(declared.name, declared.title, headings, rows)
