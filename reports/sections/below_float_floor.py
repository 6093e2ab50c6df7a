"""Pure attention below the float floor, and the theorem's bounds."""

import pandas as pd

from rc_probe.reports.figures.run import recursion_figure
from rc_probe.results.words import WEIGHTS, many

from .section import Folded, Shown
from .view import View


class BelowFloatFloor:
    """The recursion, and at how many layers the bounds say something."""

    measurement, title = "floor", "Below the float floor"

    def show(self, view: View, /) -> Shown | None:
        figure = recursion_figure(view.table("recursion"), view.table("bounds"))
        recursion, bounds = view.whole("recursion"), view.whole("bounds")
        if figure is None and bounds is None:
            return None
        folded = [*Folded.of("The numbers", recursion), *Folded.of("The bounds and their constants", bounds)]
        return Shown(figures=[figure] if figure else [], after=_told(view.table("bounds")), folded=folded)


def _told(bounds: pd.DataFrame) -> list[str]:
    """At how many layers each bound says something, a sentence for each weights."""
    sentences = []
    for weights, rows in bounds.groupby("weights", sort=False):
        said = f"the one-layer bound says something at {_useful(rows['vacuous'])} of the {many(len(rows), 'layers')} measured"
        if rows["unrolled_vacuous"].notna().all():  # results of older versions do not say it
            said += f", theorem 2.2 unrolled from layer 1 at {_useful(rows['unrolled_vacuous'])}"
        sentences.append(f"{WEIGHTS.get(str(weights), str(weights))}: {said}.")
    return sentences


def _useful(vacuous: pd.Series) -> str:
    return str(int((~vacuous.astype(bool)).sum()) or "none")
