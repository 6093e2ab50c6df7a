"""The residual by layer: the paper's figure."""

from rc_probe.registry import PAPER
from rc_probe.reports.figures.run import residual_figure
from rc_probe.reports.table_cells import layer_table

from .section import Folded, Shown
from .view import View


class Residual:
    """The paper's four variants, pretrained beside freshly initialised."""

    measurement, title = "curves", "Relative residual by layer"

    def show(self, view: View, /) -> Shown | None:
        paper = {key: curve for key, curve in view.curves().items() if key[1] in PAPER}
        figure = residual_figure(paper, view.table("init_seeds"), view.metric)
        if figure is None:
            return None
        table = layer_table("residual-by-layer", f"{self.title}, mean ± std", paper)
        seeds = Folded.of("Further initialisations", view.whole("init_seeds"))
        return Shown(figures=[figure], folded=[*Folded.of("The numbers", table), *seeds])
