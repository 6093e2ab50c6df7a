"""The embeddings of each run: whether tuning, merging or quantising pressed them together."""

from rc_probe.reports.sections.section import Shown
from rc_probe.reports.sections.view import ComparedView
from rc_probe.reports.table_cells import Cell, Table, cell
from rc_probe.results.findings.embedding_words import own, title_of


class Embeddings:
    """One row per run whose embeddings were measured, where there are two."""

    measurement, title = "embeddings", "Embeddings"

    def show(self, view: ComparedView, /) -> Shown | None:
        frame = view.comparison.tables.get("embeddings")
        if frame is None or frame["run"].nunique() < 2:
            return None
        found = {str(name): own(rows) for name, rows in frame.groupby("run", sort=False)}
        metrics = list(dict.fromkeys(metric for rows in found.values() for metric in rows))
        best = {
            run.name: (run.result.model.get("embeddings") or {}).get("best") for run in view.comparison.runs
        }
        rows = [
            [
                Cell(name),
                *(cell(rows[metric]["value"] if metric in rows else None) for metric in metrics),
                cell((best.get(name) or {}).get("layer")),
            ]
            for name, rows in found.items()
        ]
        headings = ["run", *map(title_of, metrics), "best layer, on the samples that chose"]
        lead = "The model’s own embeddings of whole samples. IsoScore and RankMe grow with the number of samples: compare equal ones."
        return Shown(lead=lead, tables=[Table("embeddings", "The model’s own embedding", headings, rows)])
