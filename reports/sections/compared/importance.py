"""What each block is worth in each run: whether tuning or merging moved the work elsewhere."""

from rc_probe.reports.sections.section import Shown
from rc_probe.reports.sections.view import ComparedView
from rc_probe.reports.table_cells import Cell, Table, cell
from rc_probe.results.findings.importance_words import changes, criterion, title_of


class Importance:
    """One row per block, one column per run that was measured; the runs are judged by the same metric, or not shown."""

    measurement, title = "importance", "What each block is worth"

    def show(self, view: ComparedView, /) -> Shown | None:
        frame = view.comparison.tables.get("importance")
        if frame is None:
            return None
        runs = {str(name): rows for name, rows in frame.groupby("run", sort=False)}
        metrics = {criterion(rows) for rows in runs.values()}
        if len(runs) < 2 or len(metrics) != 1 or (metric := metrics.pop()) is None:
            return None
        costs = {name: changes(rows) for name, rows in runs.items()}
        blocks = sorted({block for cost in costs.values() for block in cost})
        if not blocks:
            return None
        rows = [[Cell(f"block {n}", str(n)), *(cell(cost.get(n)) for cost in costs.values())] for n in blocks]
        lead = f"How much the metric “{title_of(metric)}” changes when the block alone is removed."
        table = Table("importance", f"Change of {title_of(metric).lower()}", ["without", *costs], rows)
        return Shown(lead=lead, tables=[table])
