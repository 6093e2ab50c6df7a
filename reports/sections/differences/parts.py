"""Which blocks and branches differ, each on the same inputs."""

from rc_probe.reports.figures.difference import parts_figure
from rc_probe.reports.sections.section import Folded, Shown
from rc_probe.reports.table_cells import Table, cell

from .view import DiffView

PARTS = ("block", "attention", "cross", "mixer", "mlp")


class Parts:
    """A line for each kind of part."""

    measurement, title = "differences", "Whose doing it is"

    def show(self, view: DiffView, /) -> Shown | None:
        curves = {
            (part, metric): view.curve(part, metric)
            for part in PARTS
            for metric in ("sensitivity", "sensitivity_bulk")
        }
        curves = {key: curve for key, curve in curves.items() if curve}
        figure = parts_figure(view, [part for part in PARTS if (part, "sensitivity_bulk") in curves])
        if figure is None:
            return None
        blocks = sorted(set().union(*curves.values()))
        rows = [[cell(block), *(cell(curve.get(block)) for curve in curves.values())] for block in blocks]
        headings = [part + (", bulk" if metric.endswith("bulk") else "") for part, metric in curves]
        table = Table("parts", "Sensitivity by block", ["block", *headings], rows)
        lead = (
            f"Each block of {view.b} was run on what the same block of {view.a} got, and each branch on what the same branch "
            "got, so that errors of earlier parts do not add up. Shares are of the stream behind the part."
        )
        return Shown(lead=lead, figures=[figure], folded=Folded.of("The numbers", table))
