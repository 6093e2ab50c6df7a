"""Nearest neighbours by heads of low rank."""

import pandas as pd

from rc_probe.reports.figures.experiments.nearest import encoders_figure, heads_figure
from rc_probe.reports.sections.section import Folded, Shown
from rc_probe.reports.table_cells import Table, cell

from .view import ExperimentView, spread

COLUMNS = ("target", "points", "dim", "count", "layers", "rank", "heads", "scratch", "parameters")
LAW = ("nearest", "orthogonal", 2, 0)  # what the plateau is a law of: target, points, count, layers


class Nearest:
    """One layer on two points, then encoders, and a row for each network."""

    measurement, title = "errors", "Rank against number of heads"

    def show(self, view: ExperimentView, /) -> Shown | None:
        frame = view.table("errors")
        if frame.empty:
            return None
        keys = frame[["target", "points", "count", "layers"]].apply(tuple, axis=1)
        two = frame[keys == LAW]
        dims = sorted(two["dim"].unique())
        heads = {f"d = {dim}": two[(two["rank"] == 1) & (two["dim"] == dim)] for dim in dims}
        splits = two[(two["dim"] == dims[-1]) & (two["rank"] * two["heads"] == dims[-1])]
        figures = [heads_figure(heads, splits, view.table("truncation"))]
        if len(deep := frame[frame["layers"] > 0]):
            figures.append(encoders_figure(*_lines(deep)))
        lead = (
            "Each point of a sequence, or a query, asks for the point that is nearest to it or farthest from it. A head of rank r "
            "compares them in r dimensions of d. All networks of a kind are trained alike, on fresh points in every step."
        )
        return Shown(
            lead=lead, figures=figures, tables=[_head(view)], folded=Folded.of("All networks", _errors(frame))
        )


def _lines(deep: pd.DataFrame) -> tuple[dict[str, pd.DataFrame], dict[str, pd.DataFrame]]:
    """Rows by depth (and with scratch space) at the usual number of points, and by number of points at two layers."""
    plain, usual = deep[deep["scratch"] == 0], deep.groupby("count")["layers"].nunique().idxmax()
    depths, contexts = {}, {}
    for layers in sorted(plain["layers"].unique()):
        name = "1 layer" if layers == 1 else f"{layers} layers"
        depths[name] = plain[(plain["count"] == usual) & (plain["layers"] == layers)]
    if len(scratch := deep[deep["scratch"] > 0]):
        depths["2 layers, scratch space"] = scratch
    for count in sorted(plain["count"].unique()):
        contexts[f"{count} points"] = plain[(plain["layers"] == 2) & (plain["count"] == count)]
    return depths, contexts


def _head(view: ExperimentView) -> Table:
    names = {
        "cosine": "cosine of Qᵀ K with the identity",
        "ratio": "largest singular value over the smallest",
        "effective_rank": "effective rank",
    }
    rows = [
        [cell(names[str(name)]), spread(v)]
        for name, v in view.table("full_head").groupby("quantity", sort=False)["value"]
    ]
    return Table(
        "full-head", "The trained head of full rank", ["", "mean over seeds, lowest to highest"], rows
    )


def _errors(frame: pd.DataFrame) -> Table:
    rows = []
    for key, v in frame.groupby(list(COLUMNS), sort=False)["error"]:
        assert isinstance(key, tuple)
        rows.append([*map(cell, key), spread(v)])
    headings = ["target", "drawn", "d", "points", "layers", "rank", "heads", "scratch", "parameters", "error"]
    return Table("errors", "Mean squared distance to the right point", headings, rows)
