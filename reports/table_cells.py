"""Tables for reading: cells with the number to sort by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from markupsafe import Markup

from rc_probe.results import tables
from rc_probe.results.curves import Curves
from rc_probe.results.tables import Column
from rc_probe.results.words import WEIGHTS, number


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
    """A table cell: its text, the number to sort by where it is one, and the level whose colour it has."""

    text: str
    value: str | None = None
    level: str = ""


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


def with_interval(value: float, low: float, high: float) -> Cell:
    """`0.320 (0.310 to 0.330)`; the value alone where its interval is not known."""
    one = cell(value)
    if not (math.isfinite(low) and math.isfinite(high)):
        return one
    return Cell(f"{one.text} ({number(low, 3)} to {number(high, 3)})", one.value)


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


def layer_table(name: str, caption: str, found: Curves) -> Table | None:
    """A row per layer, a column per weights and variant, in each mean ± std."""
    if not found:
        return None
    keys = sorted(found, key=lambda key: list(WEIGHTS).index(key[0]) if key[0] in WEIGHTS else len(WEIGHTS))
    rows = []
    for layer in sorted({layer for curve in found.values() for layer in curve.layers}):
        row = [cell(layer)]
        for key in keys:
            curve = found[key]
            if layer not in curve.layers:
                row.append(cell(None))
                continue
            place = curve.layers.index(layer)
            mean, std = cell(curve.means[place]), curve.stds[place]
            row.append(Cell(mean.text + (f" ± {number(std)}" if math.isfinite(std) else ""), mean.value))
        rows.append(row)
    weights = list(dict.fromkeys(key[0] for key in keys))
    groups = [(WEIGHTS.get(name, name), sum(key[0] == name for key in keys)) for name in weights]
    return Table(name, caption, ["layer", *(key[1] for key in keys)], rows, groups)
