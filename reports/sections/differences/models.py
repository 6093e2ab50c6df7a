"""The two models, beside each other."""

from rc_probe.reports.sections.section import Shown
from rc_probe.reports.table_cells import Cell, Table

from .view import DiffView

SHOWN = {
    "id": "model", "class": "class", "revision": "revision", "parameters": "parameters", "blocks": "blocks", "dim": "width",
    "signature": "block", "attention": "attention", "dtype": "dtype", "device": "device", "stack": "stack",
}  # fmt: skip


class Models:
    """A row for each fact."""

    measurement, title = "differences", "The models"

    def show(self, view: DiffView, /) -> Shown | None:
        a, b = view.result.a, view.result.b
        rows = [
            [Cell(name), *(Cell("–" if one.get(key) is None else str(one[key])) for one in (a, b))]
            for key, name in SHOWN.items()
            if a.get(key) is not None or b.get(key) is not None
        ]
        notes = [f"{one.get('name')}: {note}" for one in (a, b) for note in one.get("notes") or []]
        table = Table("models", "The two models", ["", view.a, view.b], rows)
        return Shown(tables=[table], after=notes)
