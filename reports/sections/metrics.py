"""Every metric beside the residual, by layer."""

from rc_probe.registry import METRICS, PAPER
from rc_probe.reports.figures.run import metrics_figure
from rc_probe.reports.table_cells import Table, layer_table

from .section import Folded, Shown
from .view import View


class OtherMetrics:
    """A panel and a table for each; of the residual itself the table of ablations."""

    measurement, title = "curves", "Other metrics by layer"

    def show(self, view: View, /) -> Shown | None:
        figure = metrics_figure(view.by_metric, view.table("init_seeds"), view.metric)
        folded = Folded.of("The numbers", *_tables(view))
        if figure is None and not folded:
            return None
        return Shown(figures=[figure] if figure else [], folded=folded)


def _tables(view: View) -> list[Table | None]:
    tables = []
    for name, metric in METRICS.items():
        others = (
            name == view.metric
        )  # whose paper variants stand above; other metrics' ablations are in the CSV
        found = {key: curve for key, curve in view.curves(name).items() if (key[1] in PAPER) != others}
        title = f"{metric.title} by layer" + (", ablations" if others else "")
        tables.append(layer_table(f"by-layer-{name}", title, found))
    return tables
