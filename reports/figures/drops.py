"""What is left after removals: a curve for each method, on the samples that chose and on those held out."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from rc_probe.results.findings.drop_words import METHODS
from rc_probe.results.findings.importance_words import UNITS, title_of
from rc_probe.results.words import number

from .canvas import panel_of
from .panels import Figure, Key, Styles, by_layer, draw_line, draw_marks, set_scale, svg_dashes
from .svg import SAN, SAN_SKIP, THEME, TRANSFORMER

LOOKS: Styles = {"greedy": (TRANSFORMER, ()), "angular": (SAN, (5, 2.2)), "random": (SAN_SKIP, (1.2, 1.8))}
SPLITS = {"chosen": "On the samples that chose", "held_out": "On samples held out"}


def drops_figure(frame: pd.DataFrame, metric: str) -> Figure | None:
    """The change of the metric by how many parts are gone; frame: the table `drops`."""
    rows = frame[(frame["metric"] == metric) & frame["change"].notna()]
    if rows.empty:
        return None
    panels = [_panel(rows, split, metric) for split in SPLITS]
    methods = [method for method in METHODS if method in set(rows["method"])]
    keys = [Key(METHODS[method], THEME[LOOKS[method][0]], svg_dashes(LOOKS[method][1])) for method in methods]
    caption = "Change from the whole model. Of random orders the mean is a line, each order is a thin one."
    return Figure("drops", f"{title_of(metric)} by removed parts", caption, keys, panels)


def _panel(rows: pd.DataFrame, split: str, metric: str) -> str:
    mine, unit = rows[rows["split"] == split], UNITS.get(metric, "")
    with panel_of(f"drop{split[0]}", SPLITS[split]) as panel:
        by_layer(panel.axes, int(rows["step"].max()), "parts removed")
        set_scale(panel.axes, rows["change"].tolist(), log=False)
        for _, own in mine[mine["method"] == "random"].groupby("draw"):
            steps, changes = _from_zero(dict(zip(own["step"], own["change"], strict=True)))
            draw_line(panel.axes, steps, changes, LOOKS["random"], linewidth=0.8, alpha=0.5)
        for method, own in mine.groupby("method", sort=False):
            steps, changes = _from_zero(own.groupby("step")["change"].mean().to_dict())
            draw_line(panel.axes, steps, changes, LOOKS[str(method)], linewidth=2)
            texts = [
                f"{METHODS[str(method)]}, {n} removed: {number(by, 3)}{unit}"
                for n, by in zip(steps, changes, strict=True)
            ]
            draw_marks(panel, steps, changes, LOOKS[str(method)][0], texts, hollow=[False] * len(steps))
            panel.words.append(f"{METHODS[str(method)]} {number(changes[-1])}{unit} after {steps[-1]}")
    return panel.svg


def _from_zero(found: Mapping[Any, float]) -> tuple[list[int], list[float]]:
    """Steps and changes, from the whole model on."""
    return [0, *map(int, found)], [0.0, *map(float, found.values())]
