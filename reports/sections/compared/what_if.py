"""What other masks and norms do in each run: whether training made a model depend on its own."""

from rc_probe.reports.sections.section import Shown
from rc_probe.reports.sections.view import ComparedView
from rc_probe.reports.table_cells import Cell, Table, cell
from rc_probe.results.findings.importance_words import title_of
from rc_probe.results.findings.what_if_words import RELATIVE


class WhatIf:
    """One row per network and mask or norm, one column per run that was measured with it."""

    measurement, title = "what_if", "What would change it"

    def show(self, view: ComparedView, /) -> Shown | None:
        tables = [table for kind in ("mask", "norm") if (table := _table(view, kind))]
        lead = f"The metric “{title_of(RELATIVE)}” at the last layer of each run."
        return Shown(lead=lead, tables=tables) if tables else None


def _table(view: ComparedView, kind: str) -> Table | None:
    frame = view.comparison.tables.get(f"{kind}s")
    if frame is None or frame["run"].nunique() < 2:
        return None
    rows = frame[frame["metric"] == RELATIVE]
    last = rows[rows["layer"] == rows.groupby("run")["layer"].transform("max")]
    runs = list(dict.fromkeys(last["run"]))
    values = last.set_index(["network", kind, "run"])["value"]
    cells = [
        [Cell(str(net)), Cell(str(name)), *(cell(values.get((net, name, run))) for run in runs)]
        for net, name in last[["network", kind]].drop_duplicates().itertuples(index=False, name=None)
    ]
    return Table(f"{kind}s", f"With other {kind}s", ["network", kind, *map(str, runs)], cells)
