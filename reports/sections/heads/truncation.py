"""What heads of less rank cost."""

from rc_probe.reports.figures.heads.truncation import collapse_figure, rank_figure, smallest_figure
from rc_probe.reports.sections.section import Folded, Shown
from rc_probe.reports.sections.view import View
from rc_probe.reports.table_cells import Table, whole_table


class Truncation:
    """Curves against the rank, collapse by rank, and the smallest rank of each head."""

    measurement, title = "truncation", "What heads of less rank cost"

    def show(self, view: View, /) -> Shown | None:
        found, facts = view.found(self.measurement), view.result.model.get(self.measurement) or {}
        if not found or not facts:
            return None
        frame, width = view.table("truncation"), int(facts["width"])
        blocks = ", ".join(map(str, facts.get("blocks") or []))
        figures = [
            rank_figure(frame, str(found["metric"]), width), collapse_figure(view.table("truncation_curves")),
            smallest_figure(frame, width),
        ]  # fmt: skip
        task = f" by the model's own task ({facts['task']})" if facts.get("task") else ""
        return Shown(
            lead=f"Queries of heads are projected so that their query-key form has less rank; no weight is changed. Scored{task} on "
            f"{facts.get('samples')} samples; named blocks: {blocks}.",
            finding=str(found["sentence"]),
            reasons=found.get("reasons") or [],
            figures=[figure for figure in figures if figure],
            folded=Folded.of("The numbers of whole blocks", _short(view)),
        )


def _short(view: View) -> Table | None:
    """The table without single heads, of which the file has all."""
    frame = view.table("truncation")
    return whole_table(view.declared("truncation"), frame[frame["head"].isna()].drop(columns="head"))
