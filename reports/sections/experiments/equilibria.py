"""Norms and collapse where the answer is known."""

from rc_probe.reports.figures.experiments.equilibria import equilibria_figure
from rc_probe.reports.sections.section import Folded, Shown
from rc_probe.reports.table_cells import Table, cell

from .view import ExperimentView


class Equilibria:
    """Two tokens, orthogonal values, and a row for each equilibrium."""

    measurement, title = "equilibria", "Known answers"

    def show(self, view: ExperimentView, /) -> Shown | None:
        frame = view.first("equilibria")
        if frame.empty:
            return None
        figure = equilibria_figure(view.first("two_tokens"), view.first("orthogonal"))
        shown = frame.drop(columns="seed")
        rows = [[cell(value) for value in row] for row in shown.itertuples(index=False, name=None)]
        table = Table(
            "equilibria",
            "Equilibria of every rank under causal uniform attention",
            [str(name) for name in shown],
            rows,
        )
        lead = "Nothing is trained: a layer is attention, a value matrix, and a norm that scales every token to length 1, or none."
        return Shown(lead=lead, figures=[figure], folded=Folded.of("The equilibria", table))
