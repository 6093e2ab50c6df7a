"""Attention chained along paths."""

import pandas as pd

from rc_probe.reports.figures.paths.chains import chains_figure
from rc_probe.reports.sections.section import Folded, Shown
from rc_probe.reports.sections.view import View
from rc_probe.reports.table_cells import Heading, Table, cell
from rc_probe.results import tables

SHOWN = ("length", "metric", "median", "low", "high", "mean")


class Chains:
    """How fast products of attention patterns forget which token is which."""

    measurement, title = "chains", "Attention chained along paths"

    def show(self, view: View, /) -> Shown | None:
        frame = view.table("chains")
        frame = frame[frame["median"].notna()].sort_values("length", kind="stable")
        if frame.empty:
            return None
        figure = chains_figure(frame)
        table = _table(view.declared("chains"), frame)
        return Shown(figures=[figure] if figure else [], folded=Folded.of("The numbers", table))


def _table(declared: tables.Table, frame: pd.DataFrame) -> Table:
    columns = {column.name: column for column in declared.columns}
    rows = [
        [cell(int(length)), cell(str(metric).replace("_", " ")), *(cell(float(value)) for value in values)]
        for length, metric, *values in frame[list(SHOWN)].itertuples(index=False, name=None)
    ]
    return Table("paths-chains", declared.title, [Heading.of(columns[name]) for name in SHOWN], rows)
