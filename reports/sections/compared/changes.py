"""Every metric against that of the first run: curves that lie on each other are told apart here."""

import pandas as pd

from rc_probe.registry import METRICS
from rc_probe.reports.figures.comparison import changes_figure
from rc_probe.reports.sections.section import Folded, Shown
from rc_probe.reports.sections.view import ComparedView
from rc_probe.reports.table_cells import Cell, Table, cell


class Changes:
    """Of the runs that are as deep as the first."""

    measurement, title = "curves", "Changes from the first run"

    def show(self, view: ComparedView, /) -> Shown | None:
        frame = view.comparison.tables.get("changes")
        if frame is None:
            return None
        names = [run.name for run in view.comparison.runs]
        figure = changes_figure(frame, names)
        lead = f"Each metric of the whole model, minus that of {names[0]} at the same layer."
        folded = Folded.of("The numbers", _table(frame))
        return Shown(lead=lead, figures=[figure] if figure else [], folded=folded)


def _table(frame: pd.DataFrame) -> Table:
    """A row per run and metric: the last layer, and where the change is largest."""
    rows = []
    for (metric, run), group in frame.groupby(["metric", "run"], sort=False):
        last, most = group.iloc[-1], group.iloc[int(group["change"].abs().argmax())]
        numbers = [float(last[name]) for name in ("baseline", "value", "change")]
        rows.append([
            Cell(METRICS[str(metric)].title if metric in METRICS else str(metric)), Cell(str(run)),
            *map(cell, numbers), cell(float(most["change"])), cell(int(most["layer"])),
        ])  # fmt: skip
    headings = ["metric", "run", "first run", "this run", "change", "largest change", "at layer"]
    return Table("changes", "At the last layer, and the largest change over the layers", headings, rows)
