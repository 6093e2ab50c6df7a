"""What keeps the runs from being compared."""

from rc_probe.reports.sections.section import Shown
from rc_probe.reports.sections.view import ComparedView
from rc_probe.reports.table_cells import Cell, Table


class NotAlike:
    """One row per run, one column per setting that differs."""

    measurement, title = "curves", "Not like for like"

    def show(self, view: ComparedView, /) -> Shown | None:
        found = view.comparison.differences
        if not found:
            return None
        rows = [
            [Cell(run.name), *(Cell(values[run.name]) for values in found.values())]
            for run in view.comparison.runs
        ]
        return Shown(
            lead="The runs were not measured in the same way. A difference between curves may come from one of these:",
            tables=[Table("differences", "What differs", ["run", *found], rows)],
            warning=True,
        )
