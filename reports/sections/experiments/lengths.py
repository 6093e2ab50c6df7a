"""What paths of each length are worth, over the seeds."""

import pandas as pd

from rc_probe.reports.figures.paths.effect import effect_figure
from rc_probe.reports.sections.section import Folded, Shown
from rc_probe.reports.table_cells import Table, cell, with_interval

from .view import ExperimentView, OverSeeds, spread

SPREAD = "from the lowest seed to the highest"


class Lengths:
    """The figure of a run's paths, with what guesses score, and the numbers behind it."""

    measurement, title = "paths", "What paths of each length are worth"

    def show(self, view: ExperimentView, /) -> Shown | None:
        if view.table("paths").empty:
            return None
        found = OverSeeds.of(view, "paths")
        guesses = view.table("baselines").groupby("baseline", sort=False)["accuracy"].mean()
        best = {str(name): float(value) for name, value in guesses.sort_values().items()}
        figure = effect_figure(found, guesses=dict(list(best.items())[-3:]), spread=SPREAD)
        lead = (
            "A path takes one attention head or the skip at each block; its length is the number of heads on it. The paper runs "
            "a few paths by themselves (live); exact numbers take all paths of a length out of the whole model."
        )
        return Shown(
            lead=lead,
            figures=[figure] if figure else [],
            tables=[_guesses(view)],
            folded=Folded.of("The numbers", _numbers(found.tables["paths"])),
        )


def _guesses(view: ExperimentView) -> Table:
    rows = []
    for name, values in view.table("baselines").groupby("baseline", sort=False)["accuracy"]:
        rows.append([cell(str(name)), spread(values)])
    return Table("guesses", "What needs no path", ["guess", "accuracy"], rows)


def _numbers(frame: pd.DataFrame) -> Table:
    """A row for each accuracy."""
    rows = []
    for row in frame[frame["metric"] == "accuracy"].to_dict("records"):
        names = [
            cell(row["estimator"]),
            cell(_whole(row["drawn"])),
            cell(row["scope"]),
            cell(_whole(row["length"])),
        ]
        rows.append([*names, with_interval(row["mean"], row["low"], row["high"])])
    headings = ["estimator", "paths drawn", "scope", "length", f"accuracy ({SPREAD})"]
    return Table("lengths", "Accuracy by length", headings, rows)


def _whole(value: float) -> int | None:
    return None if pd.isna(value) else int(value)
