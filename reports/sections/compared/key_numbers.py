"""The key numbers of every run, and how far they are from those of the first."""

import pandas as pd

from rc_probe.reports.sections.section import Shown
from rc_probe.reports.sections.view import ComparedView
from rc_probe.reports.table_cells import Cell, Table, whole_table
from rc_probe.results.tables import COMPARED
from rc_probe.results.verdict import LEVELS

SHOWN = (
    "run", "step", "level", "first", "first_change", "last", "last_change", "lowest", "lowest_change", "lowest_layer",
    "blocks", "dtype", "tokens", "model", "revision", "parameters",
)  # fmt: skip


class KeyNumbers:
    """One row per run."""

    measurement, title = "curves", "Key numbers"

    def show(self, view: ComparedView, /) -> Shown | None:
        table = _table(view.comparison.tables["runs"])
        first = view.comparison.runs[0].name
        lead = f"The relative residual of the whole model, without massive tokens where every run has it: 0 is full collapse. A change is the difference from {first}."
        return Shown(lead=lead, tables=[table]) if table else None


def _table(frame: pd.DataFrame) -> Table | None:
    wanted = [column for column in SHOWN if column in frame and frame[column].notna().any()]
    for other, one in (("model", "run"), ("revision", "run")):  # said twice
        if other in wanted and one in wanted and frame[other].astype(str).equals(frame[one].astype(str)):
            wanted.remove(other)
    table = whole_table(COMPARED["runs"], frame[wanted])
    for row in table.rows if table and "level" in wanted else ():
        place = wanted.index("level")
        row[place] = Cell(row[place].text, level=row[place].text) if row[place].text in LEVELS else row[place]
    return table
