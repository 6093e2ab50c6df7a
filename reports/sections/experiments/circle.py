"""Two tokens on a circle, fed by their own network."""

import pandas as pd

from rc_probe.reports.figures.experiments.circle import distances_figure, trajectories_figure
from rc_probe.reports.sections.section import Shown
from rc_probe.reports.table_cells import Table, cell

from .view import ExperimentView, spread

RADIUS = 0.3


class Circle:
    """The distances, the trajectories, and a row for each width and arm."""

    measurement, title = "trajectories", "Do the tokens stay apart?"

    def show(self, view: ExperimentView, /) -> Shown | None:
        frame = view.table("trajectories")
        if frame.empty:
            return None
        lead = (
            "A network with one block of attention learns to say the next points of two tokens on a circle, then it is fed its own "
            "answers. The four arms of a width and training differ in nothing but the skip of the attention and the MLP."
        )
        first = view.first("trajectories")
        figures = [distances_figure(frame)]
        figures += [
            trajectories_figure(first[first["training"] == training], RADIUS, training)
            for training in first["training"].unique()
        ]
        return Shown(lead=lead, figures=figures, tables=[_table(frame, view.table("fits"))])


def _table(frame: pd.DataFrame, fits: pd.DataFrame) -> Table:
    keys, steps = (
        ["width", "training", "arm"],
        [step for step in (10, 50, 300) if (frame["step"] == step).any()],
    )
    ends = [frame[frame["step"] == step].set_index(keys)["distance"] for step in steps]
    rows = []
    for key in fits[keys].drop_duplicates().itertuples(index=False, name=None):
        values = [one.loc[[key]] for one in (fits.set_index(keys)["error"], *ends)]
        rows.append([*map(cell, key), *map(spread, values)])
    headings = [*keys, "error of one step", *(f"distance at step {step}" for step in steps)]
    return Table("arms", "Mean over seeds, from the lowest to the highest", headings, rows)
