"""Massive tokens: which are longer than the others by far, and what is excluded for their sake."""

import pandas as pd

from rc_probe.registry import MASSIVE, WHOLE
from rc_probe.reports.figures.massive import massive_figure
from rc_probe.reports.table_cells import Heading, Table, cell
from rc_probe.results import tables
from rc_probe.results.findings.massive_words import groups
from rc_probe.results.words import number

from .section import Folded, Shown
from .view import View

MOST_ROWS = 100  # of the table on the page; the file has all


class MassiveTokens:
    """Only where there are some."""

    measurement, title = "massive", "Massive tokens"

    def show(self, view: View, /) -> Shown | None:
        found = view.found(self.measurement)
        frame = view.table("massive")
        frame = frame[frame["norm_over_median"].notna()]
        if frame.empty or not found:
            return None
        curve = view.curves().get(("pretrained", WHOLE))
        last = max([int(frame["layer"].max()), *(curve.layers[-1:] if curve else [])])
        lead = (
            f"A massive token is one whose norm is over {MASSIVE} times the median norm of its sample at that layer. "
            f"The bulk is all other tokens.{_excluded(view)}"
        )
        figure = massive_figure(groups(frame), view.curves("massive_share"), last)
        return Shown(
            lead=lead,
            finding=found["sentence"],
            reasons=found.get("reasons", ()),
            figures=[figure] if figure else [],
            folded=Folded.of(
                "The numbers", _table(view.declared("massive"), frame), view.whole("massive_levels")
            ),
        )


def _excluded(view: View) -> str:
    """The largest share of tokens that the bulk is without."""
    curve = view.curves("massive_share").get(("pretrained", WHOLE))
    if curve is None or not any(curve.means):
        return ""
    most = max(range(len(curve.layers)), key=lambda i: curve.means[i])
    share = number(100 * curve.means[most])
    return f" It excludes at most {share} % of the tokens (layer {curve.layers[most]}, metric massive_share)."


def _table(declared: tables.Table, frame: pd.DataFrame) -> Table:
    columns = {column.name: Heading.of(column) for column in declared.columns}
    shown = frame.nlargest(MOST_ROWS, "norm_over_median").sort_index()
    rows = [[cell(value) for value in row] for row in shown.itertuples(index=False, name=None)]
    title = declared.title
    if len(shown) < len(frame):
        title += f": the {len(shown)} largest of {len(frame)} rows, all are in massive.csv"
    return Table(declared.name, title, [columns[str(name)] for name in frame], rows)
