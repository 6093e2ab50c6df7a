"""The runs that could not be made."""

from rc_probe.reports.sections.section import Shown
from rc_probe.reports.sections.view import ComparedView
from rc_probe.reports.table_cells import whole_table
from rc_probe.results.tables import COMPARED


class Failures:
    """One row per run, with the reason."""

    measurement, title = "curves", "Not measured"

    def show(self, view: ComparedView, /) -> Shown | None:
        table = whole_table(COMPARED["failures"], view.comparison.tables.get("failures"))
        return Shown(tables=[table]) if table else None
