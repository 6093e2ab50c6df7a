"""What can go: the list that won, the curves of all methods, and how to build what is left."""

from typing import Any

import pandas as pd

from rc_probe.reports.figures.drops import drops_figure
from rc_probe.reports.table_cells import Cell, Table, cell, with_interval
from rc_probe.results.findings.drop_words import METHODS
from rc_probe.results.findings.importance_words import title_of

from .section import Folded, Shown
from .view import View


class Drops:
    """Only where parts were asked to be dropped."""

    measurement, title = "drops", "What can go"

    def show(self, view: View, /) -> Shown | None:
        found, facts = view.found(self.measurement), view.result.model.get(self.measurement) or {}
        if not found or not facts:
            return None
        frame, metric = view.table("drops"), str(facts["criterion"])
        figure = drops_figure(frame, metric)
        samples = facts.get("samples") or {}
        lead = (
            f"Parts are removed one after the other; {samples.get('chosen')} samples choose, the other "
            f"{samples.get('held_out')} say what that costs."
        )
        table = _table(frame[frame["metric"] == metric], metric) if len(frame) else None
        return Shown(
            lead=lead,
            finding=str(found["sentence"]),
            reasons=found.get("reasons") or [],
            figures=[figure] if figure else [],
            folded=[
                *Folded.of("The lists, for use elsewhere", _lists(facts)),
                *Folded.of("The numbers", table),
            ],
        )


def _lists(facts: dict[str, Any]) -> Table | None:
    """The indices, and the forms that fit in a line; code stands in results.json."""
    rows = [
        *(
            [Cell(f"{component}, numbers {words}"), Cell(", ".join(map(str, numbers)))]
            for key, words in (("from_1", "from 1"), ("from_0", "from 0"))
            for component, numbers in (facts.get(key) or {}).items()
        ),
        [Cell("--ablate"), Cell(str(facts.get("ablate")))],
        *(
            [Cell(str(name)), Cell(str(text))]
            for name, text in (facts.get("forms") or {}).items()
            if "\n" not in str(text)
        ),
    ]
    return (
        Table("drops-lists", "What was removed, and what builds the rest", ["form", "text"], rows)
        if facts["removed"]
        else None
    )


def _table(frame: pd.DataFrame, metric: str) -> Table:
    """A row for each method and number of parts, both halves beside each other."""
    rows = []
    for key, own in frame.groupby(["method", "draw", "step"], dropna=False, sort=False):
        method, draw, step = map(str, key)
        name = METHODS[method] + ("" if draw == "nan" else f" {draw.removesuffix('.0')}")
        at = own.iloc[0]
        cells = [_value(own[own["split"] == split]) for split in ("chosen", "held_out")]
        rows.append([Cell(name), cell(int(step)), Cell(f"{at['component']} {int(at['block'])}"), *cells])
    headings = ["method", "removed", "this step (of the window its first block)", "chosen", "held out"]
    return Table("drops", f"Change of {title_of(metric).lower()} from the whole model", headings, rows)


def _value(rows: pd.DataFrame) -> Cell:
    if rows.empty:
        return cell(None)
    return with_interval(*(float(rows.iloc[0][name]) for name in ("change", "low", "high")))
