"""The residual over training, where the runs are checkpoints of one."""

from rc_probe.reports.figures.comparison import training_figures
from rc_probe.reports.sections.section import Shown
from rc_probe.reports.sections.view import ComparedView


class Training:
    """Of a few layers as lines, of every layer as a map."""

    measurement, title = "curves", "Relative residual over training"

    def show(self, view: ComparedView, /) -> Shown | None:
        found = view.whole(view.comparison.metric)
        runs = [run for run in view.comparison.runs if run.name in found]
        if not view.comparison.training or len(runs) < 2:
            return None
        figures = training_figures([int(run.step or 0) for run in runs], list(found.values()))
        return Shown(figures=figures) if figures else None
