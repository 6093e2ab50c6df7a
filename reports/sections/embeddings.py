"""Embeddings of whole samples: the cosine that says nothing, the directions in use, and the layer that finds best."""

import pandas as pd

from rc_probe.reports.figures.embeddings import embeddings_figure
from rc_probe.reports.table_cells import Table, cell, with_interval
from rc_probe.results.findings.embedding_words import title_of

from .section import Folded, Shown
from .view import View


class Embeddings:
    """Only of models whose embeddings were measured."""

    measurement, title = "embeddings", "Embeddings"

    def show(self, view: View, /) -> Shown | None:
        frame, found = view.table("embeddings"), view.found(self.measurement)
        figure = embeddings_figure(frame, view.table("embedding_cosines"))
        if figure is None or not found:
            return None
        facts = view.result.model.get(self.measurement) or {}
        pooling = " and ".join(
            {"cls": "first token", "lasttoken": "last token"}.get(one, one)
            for one in facts.get("pooling") or ()
        )
        lead = (
            f"One vector for each of {facts.get('samples')} {facts.get('things')}: the tokens of a layer, pooled as the model pools its "
            f"last ones ({pooling})."
        )
        return Shown(
            lead=lead,
            finding=str(found["sentence"]),
            reasons=found.get("reasons") or [],
            figures=[figure],
            folded=Folded.of("The numbers", _by_layer(frame), view.whole("embedding_components")),
        )


def _by_layer(frame: pd.DataFrame) -> Table:
    """A row for each layer, a column for each metric."""
    metrics = list(dict.fromkeys(frame["metric"]))
    rows = []
    for layer, own in frame.groupby("layer"):
        there = {str(row["metric"]): row for row in own.to_dict("records")}
        cells = [
            with_interval(*(float(there[name][key]) for key in ("value", "low", "high")))
            if name in there
            else cell(None)
            for name in metrics
        ]
        rows.append([cell(int(str(layer))), *cells])
    return Table("embeddings", "Embeddings by layer", ["layer", *map(title_of, metrics)], rows)
