"""The residual of every run by layer."""

from rc_probe.reports.figures.comparison import curves_figure
from rc_probe.reports.sections.section import Shown
from rc_probe.reports.sections.view import ComparedView


class Curves:
    """A curve for each run; by relative depth too where depths differ."""

    measurement, title = "curves", "Relative residual of every run"

    def show(self, view: ComparedView, /) -> Shown | None:
        figure = curves_figure(view.whole(view.comparison.metric))
        return Shown(figures=[figure]) if figure else None
