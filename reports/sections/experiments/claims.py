"""The claims, one by one."""

import pandas as pd

from rc_probe.reports.sections.section import Shown
from rc_probe.reports.table_cells import Cell, Heading, Table, cell, with_interval
from rc_probe.results.tables import CLAIMS

from .view import ExperimentView

HOLDS = {True: Cell("yes", None, "healthy"), False: Cell("no", None, "collapsed")}


class Claims:
    """A row for each claim."""

    measurement, title = "claims", "The claims"

    def show(self, view: ExperimentView, /) -> Shown | None:
        rows = []
        for row in view.table("claims").to_dict("records"):
            more = row["low"] < row["high"]
            measured = (
                with_interval(row["measured"], row["low"], row["high"]) if more else cell(row["measured"])
            )
            known = None if pd.isna(row["holds"]) else bool(row["holds"])
            holds = cell(None) if known is None else HOLDS[known]
            rows.append([Cell(row["claim"]), Cell(row["expected"]), measured, holds, Cell(row["source"])])
        columns = {column.name: column for column in CLAIMS["claims"].columns}
        headings = [
            Heading.of(columns[name]) for name in ("claim", "expected", "measured", "holds", "source")
        ]
        lead = (
            f"The mean over {view.seeds} seeds, from the lowest to the highest. A claim holds where it holds with every seed."
            if view.seeds > 1
            else "Measured with one seed, which says nothing about the spread."
        )
        return Shown(
            lead=lead, tables=[Table("claims", "What is claimed, and what was measured", headings, rows)]
        )
