"""The models' own attention side by side: how many heads have a sink, how evenly they attend, what they keep."""

from rc_probe.reports.sections.section import Shown
from rc_probe.reports.sections.view import ComparedView
from rc_probe.reports.table_cells import Table, cell
from rc_probe.results.findings.attention_words import key_numbers


class OwnAttention:
    """One row per run that has it; not shown for fewer than two."""

    measurement, title = "attention", "The models’ own attention"

    def show(self, view: ComparedView, /) -> Shown | None:
        frame, masks = (view.comparison.tables.get(name) for name in ("attention", "attention_masks"))
        if frame is None or frame["run"].nunique() < 2:
            return None
        rows = []
        for run, own in frame.groupby("run", sort=False):
            mine = None if masks is None else masks[masks["run"] == run]
            rows.append([cell(str(run)), *map(cell, key_numbers(own, mine).values())])
        heading = ["run", *key_numbers(frame, None)]
        return Shown(
            lead="Means over the heads of self-attention, on the samples that were read.",
            tables=[Table("attention", "Heads with a sink, and what attention keeps", heading, rows)],
        )
