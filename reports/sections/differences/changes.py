"""How each metric of the stream changes from one model to the other."""

from rc_probe.registry import CHANGE, METRICS
from rc_probe.reports.figures.difference import metric_changes_figure
from rc_probe.reports.sections.section import Folded, Shown
from rc_probe.reports.table_cells import Table, cell

from .view import DiffView


class Changes:
    """A small panel for each metric."""

    measurement, title = "differences", "Changes of the metrics"

    def show(self, view: DiffView, /) -> Shown | None:
        curves = {name: view.curve("stream", CHANGE + name) for name in METRICS}
        curves = {name: curve for name, curve in curves.items() if curve}
        if not curves:
            return None
        layers = sorted(set().union(*curves.values()))
        rows = [[cell(layer), *(cell(curve.get(layer)) for curve in curves.values())] for layer in layers]
        headings = ["layer", *(METRICS[name].title for name in curves)]
        table = Table("changes", f"{view.b} minus {view.a}", headings, rows)
        lead = f"Each metric of {view.b}, minus that of {view.a} at the same layer; mean over samples, ± 1 standard deviation."
        figure = metric_changes_figure(view, curves)
        return Shown(lead=lead, figures=[figure], folded=Folded.of("The numbers", table))
