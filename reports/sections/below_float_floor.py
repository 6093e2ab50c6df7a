"""Pure attention below the float floor, and the theorem's bound."""

import pandas as pd

from rc_probe.reports.figures.run import recursion_figure
from rc_probe.results.words import WEIGHTS, many

from .section import Folded, Shown
from .view import View


class BelowFloatFloor:
    """The recursion, and at how many layers the bound says something."""

    measurement, title = "floor", "Below the float floor"

    def show(self, view: View, /) -> Shown | None:
        figure = recursion_figure(view.table("recursion"), view.table("bounds"))
        recursion, bounds = view.whole("recursion"), view.whole("bounds")
        if figure is None and bounds is None:
            return None
        folded = [*Folded.of("The numbers", recursion), *Folded.of("The bound and its constants", bounds)]
        return Shown(figures=[figure] if figure else [], after=_told(view.table("bounds")), folded=folded)


def _told(bounds: pd.DataFrame) -> list[str]:
    """At how many layers the theorem's bound says something, a sentence for each weights."""
    sentences = []
    for weights, rows in bounds.groupby("weights", sort=False):
        useful = int((~rows["vacuous"].astype(bool)).sum())
        said = f"not vacuous at {useful} of the" if 0 < useful < len(rows) else "vacuous at none of the"
        said = said if useful else "vacuous at all"
        name = WEIGHTS.get(str(weights), str(weights))
        sentences.append(f"{name}: the bound of theorem 2.2 is {said} {many(len(rows), 'layers')} measured.")
    return sentences
