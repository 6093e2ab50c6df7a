"""What the parts that were asked for do: the residual with each of them off."""

from rc_probe.registry import PAPER
from rc_probe.reports.figures.run import ablation_figure

from .section import Folded, Shown
from .view import View


class Ablations:
    """Only where something was ablated beside the paper's variants, which are shown elsewhere."""

    measurement, title = "ablations", "With parts of the model off"

    def show(self, view: View, /) -> Shown | None:
        figure = ablation_figure(view.curves())
        asked = not view.table("ablations")["component"].isin(PAPER).all()
        table = view.whole("ablations") if asked else None
        if figure is None and table is None:
            return None
        return Shown(
            figures=[figure] if figure else [], folded=Folded.of("All ablations, all metrics", table)
        )
