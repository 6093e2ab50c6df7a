"""What would change it: masks, norms, temperatures and skip strengths on the same weights."""

import pandas as pd

from rc_probe.reports.figures.what_if.grid import grid_figure
from rc_probe.reports.figures.what_if.phase import map_figure, sweeps_figure
from rc_probe.reports.table_cells import Cell, Table, cell, with_interval
from rc_probe.results.findings.importance_words import criterion, title_of

from .section import Folded, Shown
from .view import View

AT_LAST = ("residual_bulk", "residual_frobenius", "residual_frobenius_absolute", "cosine", "cosine_absolute", "effective_rank")  # fmt: skip


class WhatIf:
    """Only where masks, norms or a map were asked for."""

    measurement, title = "what_if", "What would change it"

    def show(self, view: View, /) -> Shown | None:
        masks, norms, phase = (view.table(name) for name in ("masks", "norms", "phase"))
        figures = [
            grid_figure(masks, "mask"),
            grid_figure(norms, "norm"),
            sweeps_figure(phase),
            map_figure(phase),
        ]
        if not any(figures):
            return None
        found, facts = view.found(self.measurement), view.result.model.get(self.measurement) or {}
        task = f", scored by its own task ({facts['task']})" if facts.get("task") else ""
        return Shown(
            lead=f"Other masks, norms, temperatures and skips, put into the model without training it again{task}, on "
            f"{facts.get('samples', 'the first')} samples.",
            finding=str(found.get("sentence") or ""),
            reasons=found.get("reasons") or [],
            figures=[figure for figure in figures if figure],
            folded=Folded.of("The numbers", _table(masks, "mask"), _table(norms, "norm"), _map(phase)),
        )


def _table(frame: pd.DataFrame, kind: str) -> Table | None:
    """A row for each cell: the metrics of the stream at the last layer, and the changes of what the model predicts."""
    if frame.empty:
        return None
    last = frame[frame["layer"] == frame["layer"].max()]
    scored = list(dict.fromkeys(last[last["floor"].isna()]["metric"]))
    stream = [name for name in AT_LAST if name in set(last["metric"])]
    rows = []
    for (net, name), own in last.groupby(["network", kind], sort=False):
        by = own.set_index("metric")
        values = [cell(by["value"].get(metric)) for metric in stream]
        changes = [with_interval(*(float(by[c].get(m, float("nan"))) for c in ("change", "low", "high"))) for m in scored]  # fmt: skip
        rows.append([Cell(str(net)), Cell(str(name)), *values, *changes])
    headings = ["network", kind, *map(title_of, stream), *(f"{title_of(name)}, change" for name in scored)]
    return Table(f"{kind}s", f"At the last layer, by network and {kind}", headings, rows)


def _map(frame: pd.DataFrame) -> Table | None:
    if frame.empty:
        return None
    metrics = list(dict.fromkeys(frame["metric"]))
    judged = criterion(frame)
    rows = []
    for (x, y), own in frame.groupby(["x_value", "y_value"], sort=False):
        by = own.set_index("metric")
        rows.append([Cell(str(x)), Cell(str(y)), *(cell(by["value"].get(metric)) for metric in metrics)])
    headings = [str(frame["x"].iloc[0]), str(frame["y"].iloc[0]), *map(title_of, metrics)]
    return Table("phase", f"The map, judged by {title_of(str(judged)).lower()}", headings, rows)
