"""How far apart the streams of two models are by layer."""

from rc_probe.reports.figures.difference import streams_figure
from rc_probe.reports.sections.section import Folded, Shown
from rc_probe.reports.table_cells import Table, cell

from .view import DiffView

METRICS = {
    "difference": "relative difference",
    "difference_bulk": "of the bulk",
    "cka": "linear CKA",
    "cka_bulk": "CKA of the bulk",
}


class Streams:
    """The relative difference, and CKA where it was measured."""

    measurement, title = "differences", "The streams by layer"

    def show(self, view: DiffView, /) -> Shown | None:
        curves = {name: view.curve("stream", metric) for metric, name in METRICS.items()}
        curves = {name: curve for name, curve in curves.items() if curve}
        if not curves:
            return None
        layers = sorted(set().union(*curves.values()))
        rows = [[cell(layer), *(cell(curve.get(layer)) for curve in curves.values())] for layer in layers]
        table = Table("streams", "By layer", ["layer", *curves], rows)
        lead = (
            f"The same samples went through {view.a} and {view.b}. Layer 0 is what enters block 1; what differs at a layer may "
            "come from any block before it."
        )
        return Shown(lead=lead, figures=[streams_figure(view)], folded=Folded.of("The numbers", table))
