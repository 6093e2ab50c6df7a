"""Pure attention below the float floor, and the theorem's bounds."""

import pandas as pd

from rc_probe.reports.figures.corollary import corollary_figure
from rc_probe.reports.figures.run import recursion_figure
from rc_probe.results.words import WEIGHTS, many, number

from .section import Folded, Shown
from .view import View


class BelowFloatFloor:
    """The recursion, and at how many layers the bounds say something."""

    measurement, title = "floor", "Below the float floor"

    def show(self, view: View, /) -> Shown | None:
        figure = recursion_figure(view.table("recursion"), view.table("bounds"))
        recursion, bounds, corollary = (view.whole(name) for name in ("recursion", "bounds", "corollary"))
        with_mlp = corollary_figure(view.table("corollary"))
        if figure is None and bounds is None and with_mlp is None:
            return None
        folded = [
            *Folded.of("The numbers", recursion),
            *Folded.of("The bounds and their constants", bounds, corollary),
        ]
        after = [*_told(view.table("bounds")), *_mlps(view.table("corollary"))]
        return Shown(figures=[one for one in (figure, with_mlp) if one], after=after, folded=folded)


def _told(bounds: pd.DataFrame) -> list[str]:
    """At how many layers each bound says something, a sentence for each weights."""
    sentences = []
    for weights, rows in bounds.groupby("weights", sort=False):
        said = f"the one-layer bound says something at {_useful(rows['vacuous'])} of the {many(len(rows), 'layers')} measured"
        if rows["unrolled_vacuous"].notna().all():  # results of older versions do not say it
            said += f", theorem 2.2 unrolled from layer 1 at {_useful(rows['unrolled_vacuous'])}"
        sentences.append(f"{WEIGHTS.get(str(weights), str(weights))}: {said}.")
    return sentences


def _mlps(corollary: pd.DataFrame) -> list[str]:
    """What MLPs do to the residual, beside what their weights allow, a sentence for each weights."""
    sentences = []
    for weights, rows in corollary[corollary["gain"].notna()].groupby("weights", sort=False):
        first, last = int(rows["layer"].min()), int(rows["layer"].max())
        where = f"in blocks {first} to {last}" if last > first else f"in block {first}"
        said = f"with MLPs, {where}, a block leaves {_span(rows['rate'])} of the residual before it"
        said += f" (pure attention {_span(rows['rate_san'])})" if rows["rate_san"].notna().any() else ""
        said += f"; the MLPs alone multiply it by {_span(rows['gain'])}"
        said += (
            f", and their weights allow λ = {_span(rows['lipschitz'])}"
            if rows["lipschitz"].notna().any()
            else ""
        )
        sentences.append(f"{WEIGHTS.get(str(weights), str(weights))}: {said} (corollary 3.2).")
    return sentences


def _span(values: pd.Series) -> str:
    low, high = number(float(values.min())), number(float(values.max()))
    return low if low == high else f"{low} to {high}"


def _useful(vacuous: pd.Series) -> str:
    return str(int((~vacuous.astype(bool)).sum()) or "none")
