"""The ranks of heads: how much of their width they use."""

import pandas as pd

from rc_probe.registry import HEAD_METRICS
from rc_probe.reports.figures.heads.maps import head_maps, pair_figure
from rc_probe.reports.sections.section import Folded, Shown
from rc_probe.reports.sections.view import View
from rc_probe.reports.table_cells import Cell, Table, cell
from rc_probe.results.words import number


class HeadRanks:
    """Heat maps of heads, and a table with their ranges by block."""

    measurement, title = "heads", "What rank do heads have?"

    def show(self, view: View, /) -> Shown | None:
        frame, found = view.table("heads"), view.found(self.measurement)
        facts = view.result.model.get(self.measurement) or {}
        if frame.empty or not found:
            return None
        where = " at equal positions" if facts.get("turning") else ""
        figures = [head_maps(frame, int(facts.get("width") or 1)), pair_figure(frame)]
        return Shown(
            lead=f"A head looks by the form zᵀ M z′{where} and writes by another one, both of rank at most its width. The gain of the norm "
            f"before it and its biases are included. Scores were read on {facts.get('samples', 'the first')} samples.",
            finding=str(found.get("sentence") or ""),
            reasons=found.get("reasons") or [],
            figures=[figure for figure in figures if figure],
            folded=Folded.of("The numbers by block", _by_block(frame)),
        )


def _by_block(frame: pd.DataFrame) -> Table:
    """A row for each block and circuit: the least and the most of its heads."""
    single = frame[frame["head"].notna()]
    metrics = [name for name in HEAD_METRICS if name in set(single["metric"])]
    ends = {
        key: (float(rows.min()), float(rows.max()))
        for key, rows in single.groupby(["block", "circuit", "metric"])["value"]
    }
    rows = []
    for block, circuit in single[["block", "circuit"]].drop_duplicates().itertuples(index=False, name=None):
        line = [cell(int(block)), cell(str(circuit))]
        for metric in metrics:
            low, high = ends.get((block, circuit, metric), (None, None))
            one = cell(low)
            line.append(one if low == high else Cell(f"{number(low)} to {number(high)}", one.value))
        rows.append(line)
    return Table(
        "heads",
        "Least and most of the heads of a block",
        ["block", "circuit", *(HEAD_METRICS[m].title for m in metrics)],
        rows,
    )
