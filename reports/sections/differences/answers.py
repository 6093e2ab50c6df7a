"""What the two models predict."""

from typing import Any

from rc_probe.registry import PATH_METRICS
from rc_probe.reports.sections.section import Shown
from rc_probe.reports.table_cells import Cell, Table, cell
from rc_probe.results.words import number

from .view import DiffView


class Answers:
    """A row for each metric of the task."""

    measurement, title = "differences", "Their predictions"

    def show(self, view: DiffView, /) -> Shown | None:
        found = view.predictions
        rows = [
            _row(PATH_METRICS[name].title, values)
            for name, values in found.items()
            if name in PATH_METRICS and isinstance(values, dict)
        ]
        drifts = view.frame[view.frame["metric"].isin(["kl", "embedding_distance"])]
        rows += [
            [Cell(str(metric).replace("_", " ")), cell(None), cell(float(mean)), cell(None), cell(None)]
            for metric, mean in zip(drifts["metric"], drifts["mean"], strict=True)
        ]
        if not rows:
            return None
        lead = (
            f"Both predict at the same positions ({found['task']}): {found['predictions']:,} predictions of {found['samples']} "
            f"samples. Agreement is with the answers of {view.a}."
        )
        headings = ["metric", view.a, view.b, "change", "95 % interval of the change"]
        return Shown(lead=lead, tables=[Table("predictions", "Predictions", headings, rows)])


def _row(name: str, values: dict[str, Any]) -> list[Cell]:
    a, b, low, high = (values.get(key) for key in ("a", "b", "low", "high"))
    change = None if a is None or b is None else b - a
    span = cell(None) if low is None or high is None else Cell(f"{number(low)} to {number(high)}")
    return [Cell(name), cell(a), cell(b), cell(change), span]
