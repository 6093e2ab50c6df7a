"""Tables for reading: cells with the number to sort by."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from rc_probe.results.words import number

# Headings of columns, where the column's name alone does not say it.
HEADINGS = {
    "d_qk": "d per head",
    "beta": "β",
    "gamma": "γ",
    "coefficient": "4γβH/√d",
    "spread": "max D",
    "residual_in": "residual in",
    "residual_out": "residual out",
    "bound_out": "bound",
    "log10_bound_unrolled": "log₁₀ unrolled bound",
    "reason": "why vacuous",
    "residual_direct": "plain arithmetic",
    "ratio_cubed": "r / previous r³",
    "name": "module",
    "norm_after": "norm after the add",
}


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
    headings: list[str]
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


def plain_table(name: str, caption: str, frame: pd.DataFrame | None) -> Table | None:
    if frame is None or frame.empty:
        return None
    headings = [HEADINGS.get(str(column), str(column)) for column in frame]
    whole = [c for c in frame.select_dtypes("float") if (frame[c].dropna() % 1 == 0).all()]
    frame = frame.astype(dict.fromkeys(whole, "Int64"))  # counts with missing ones among them
    rows = [[cell(value) for value in row] for row in frame.itertuples(index=False, name=None)]
    return Table(name, caption, headings, rows)
