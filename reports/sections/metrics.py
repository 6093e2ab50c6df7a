"""Every metric beside the residual, by layer."""

from collections.abc import Mapping

from rc_probe.registry import METRICS, PAPER
from rc_probe.reports.figures.run import metrics_figure
from rc_probe.reports.table_cells import Table, layer_table
from rc_probe.results.curves import Curves

from .section import Folded, Shown
from .view import View

OF_BULK, SHARE = "_bulk", "massive_share"


class OtherMetrics:
    """A panel and a table for each; of the residual itself the table of ablations."""

    measurement, title = "curves", "Other metrics by layer"

    def show(self, view: View, /) -> Shown | None:
        shown, once = _once(view)
        drawn = {name: found for name, found in shown.items() if name != SHARE or not view.found("massive")}
        figure = metrics_figure(drawn, view.table("init_seeds"), view.metric)
        folded = Folded.of("The numbers", *_tables(view, shown))
        if figure is None and not folded:
            return None
        return Shown(figures=[figure] if figure else [], after=once, folded=folded)


def _once(view: View) -> tuple[Mapping[str, Curves], list[str]]:
    """The metrics without those that say the same as another, and a sentence that says so."""
    shown, left = dict(view.by_metric), []
    for name in view.by_metric:
        base = name.removesuffix(OF_BULK)
        if base != name and base in shown and view.same(name, base):
            del shown[base if name == view.metric else name]  # the headline has its own figure
            left.append(METRICS[name].title)
    none = all(not any(curve.means) for curve in view.curves(SHARE).values())
    if none:
        shown.pop(SHARE, None)
    if not left:
        return shown, []
    same = "is that of all tokens, and is shown once"
    if none and SHARE in view.by_metric:
        return shown, [f"No token is massive: each metric of the bulk {same}."]
    return shown, [f"At every layer the number of the bulk {same}: {', '.join(left)}."]


def _tables(view: View, shown: Mapping[str, Curves]) -> list[Table | None]:
    tables = []
    for name, metric in METRICS.items():
        others = (
            name == view.metric
        )  # whose paper variants stand above; other metrics' ablations are in the CSV
        found = {key: curve for key, curve in shown.get(name, {}).items() if (key[1] in PAPER) != others}
        title = f"{metric.title} by layer" + (", ablations" if others else "")
        tables.append(layer_table(f"by-layer-{name}", title, found))
    return tables
