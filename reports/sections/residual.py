"""The residual by layer: the paper's figure."""

from rc_probe.registry import PAPER, WHOLE
from rc_probe.reports.figures.run import residual_figure
from rc_probe.reports.table_cells import layer_table
from rc_probe.results.curves import RESIDUAL, Curve

from .section import Folded, Shown
from .view import View


class Residual:
    """The paper's four variants, pretrained beside freshly initialised."""

    measurement, title = "curves", "Relative residual by layer"

    def show(self, view: View, /) -> Shown | None:
        paper = {key: curve for key, curve in view.curves().items() if key[1] in PAPER}
        beside = _all_tokens(view)
        apart = not view.same(view.metric, RESIDUAL)
        figure = residual_figure(paper, view.table("init_seeds"), view.metric, beside, apart=apart)
        if figure is None:
            return None
        more = {(weights, f"{WHOLE}, all tokens"): curve for weights, curve in beside.items()}
        table = layer_table("residual-by-layer", f"{figure.title}, mean ± std", paper | more)
        seeds = Folded.of("Further initialisations", view.whole("init_seeds"))
        return Shown(figures=[figure], folded=[*Folded.of("The numbers", table), *seeds])


def _all_tokens(view: View) -> dict[str, Curve]:
    """The whole model's residual as the paper defines it, by weights, where the headline is another."""
    own = view.curves()
    return {
        weights: curve
        for (weights, variant), curve in view.curves(RESIDUAL).items()
        if variant == WHOLE and (key := (weights, variant)) in own and curve.means != own[key].means
    }
