"""What the model loses without each of its parts, and what proxies would have said."""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from rc_probe.registry import PROXY
from rc_probe.reports.figures.importance import importance_figure
from rc_probe.reports.table_cells import Cell, Table, cell, with_interval
from rc_probe.results.findings.importance_words import rankings, title_of

from .section import Folded, Shown
from .view import View


class Importance:
    """A heat map of what removals cost, a row for each part, and how proxies rank the blocks."""

    measurement, title = "importance", "What holds the model up"

    def show(self, view: View, /) -> Shown | None:
        frame = view.table("importance")
        figure = importance_figure(frame)
        if frame.empty or figure is None:
            return None
        found, facts = view.found(self.measurement), view.result.model.get(self.measurement) or {}
        task = f" by its own task ({facts['task']})" if facts.get("task") else ""
        return Shown(
            lead=f"Each part is removed alone, exactly, and what is left of the model is scored{task} on "
            f"{facts.get('samples', 'the first')} samples. What several parts cost together is not the sum.",
            finding=str(found.get("sentence") or ""),
            reasons=[reason for reason in found.get("reasons") or [] if "alone" not in reason],
            figures=[figure],
            folded=Folded.of("The numbers", _parts(frame), _proxies(frame)),
        )


def _parts(frame: pd.DataFrame) -> Table:
    """A row for each part: the change of each metric with its interval, and the proxies."""
    metrics = list(dict.fromkeys(frame["metric"]))
    keys = frame[["component", "block", "head"]].drop_duplicates()
    cells = {
        (row["component"], row["block"], _head(row["head"]), row["metric"]): row
        for row in frame.to_dict("records")
    }
    rows = []
    for component, block, head in keys.itertuples(index=False, name=None):
        line = [Cell(str(component)), cell(int(block)), cell(_head(head))]
        rows.append(
            [*line, *(_value(cells.get((component, block, _head(head), metric))) for metric in metrics)]
        )
    titles = [title_of(name) + ("" if name.startswith(PROXY) else ", change") for name in metrics]
    return Table(
        "importance",
        "Without each part (proxies: of the whole model)",
        ["part", "block", "head", *titles],
        rows,
    )


def _head(value: float | None) -> int | None:
    return None if value is None or math.isnan(value) else int(value)


def _value(row: Mapping[Hashable, Any] | None) -> Cell:
    if row is None:
        return cell(None)
    value = row["change"] if math.isfinite(row["change"]) else row["value"]
    return with_interval(float(value), row["low"], row["high"])


def _proxies(frame: pd.DataFrame) -> Table | None:
    rows = [
        [Cell(each.component), Cell(title_of(each.proxy)), cell(each.rho), cell(each.count)]
        for each in rankings(frame)
    ]
    headings = ["part", "proxy", "rank correlation", "parts"]
    return Table("importance-proxies", "Proxies beside what removals cost", headings, rows) if rows else None
