"""The ablations that all runs have, beside each other."""

from rc_probe.reports.figures.panels import spelt
from rc_probe.reports.sections.section import Shown
from rc_probe.reports.sections.view import ComparedView
from rc_probe.reports.table_cells import Cell, Table, cell


class Ablations:
    """One row per run, one column per ablation."""

    measurement, title = "ablations", "With parts off"

    def show(self, view: ComparedView, /) -> Shown | None:
        wide = view.comparison.common_ablations()
        if wide.empty:
            return None
        last = view.comparison.tables["runs"].set_index("run")["last"]
        rows = [
            [Cell(str(name)), cell(last[name]), *(cell(float(value)) for value in values)]
            for name, values in zip(wide.index, wide.to_numpy(), strict=True)
        ]
        lead = "The relative residual at the last layer, for each ablation that all runs have."
        lead += spelt(map(str, wide))
        table = Table("ablations", "Residual at the last layer", ["run", "whole", *map(str, wide)], rows)
        return Shown(lead=lead, tables=[table])
