"""The figures of two models: their streams by layer, their parts by block, the change of each metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rc_probe.registry import CHANGE, METRICS
from rc_probe.results.words import number

from .canvas import Panel, panel_of
from .comparison import styles_of
from .panels import Figure, Key, Styles, by_layer, draw_line, draw_marks, lowest, set_scale, svg_dashes
from .svg import MUTED, THEME

if TYPE_CHECKING:
    from rc_probe.reports.sections.differences.view import DiffView

STREAMS = {"all tokens": "difference", "bulk": "difference_bulk"}
CKAS = {"all tokens": "cka", "bulk": "cka_bulk"}


def streams_figure(view: DiffView) -> Figure:
    """The relative difference, linear and log, and CKA, as far as they were measured; the threshold as a line."""
    styles = styles_of(list(STREAMS))
    panels: list[str] = []
    for title, metrics, log in (
        ("Relative difference", STREAMS, False),
        ("Relative difference, log scale", STREAMS, True),
        ("Linear CKA", CKAS, False),
    ):
        curves = {name: view.curve("stream", metric) for name, metric in metrics.items()}
        curves = {name: curve for name, curve in curves.items() if curve}
        if not curves or (log and not any(any(curve.values()) for curve in curves.values())):
            continue
        limit = 1 - view.threshold if metrics is CKAS else view.threshold
        key = f"s{len(panels)}"
        panels.append(_panel(key, title, curves, styles, "layer", log=log, limit=limit, full=metrics is CKAS))
    caption = f"Dashed: the threshold, {number(view.threshold)}. Bulk: without massive tokens, which would speak for all."
    return Figure("streams", "How far apart the streams are", caption, _keys(styles), panels)


def parts_figure(view: DiffView, parts: Sequence[str]) -> Figure | None:
    """The sensitivity of the bulk of each kind of part by block."""
    curves = {part: view.curve(part, "sensitivity_bulk") for part in parts}
    if not curves:
        return None
    styles = styles_of(list(curves))
    logs = (False, True) if any(any(curve.values()) for curve in curves.values()) else (False,)
    panels = [
        _panel(f"p{log:d}", "By block" + (", log scale" if log else ""), curves, styles, "block", log=log)
        for log in logs
    ]
    caption = (
        "Each part on the same inputs: what it gives differently, as a share of the stream behind it (bulk)."
    )
    return Figure("parts", "Sensitivity of blocks and branches", caption, _keys(styles), panels)


def metric_changes_figure(view: DiffView, curves: Mapping[str, Mapping[int, float]]) -> Figure:
    """A small panel for each metric, its band one standard deviation over samples."""
    styles = styles_of([view.b])
    panels = []
    for place, (metric, curve) in enumerate(curves.items()):
        spread = view.spread("stream", CHANGE + metric)
        panels.append(
            _panel(
                f"c{place}",
                METRICS[metric].title,
                {view.b: curve},
                styles,
                "layer",
                small=True,
                spread=spread,
            )
        )
    caption = f"Above 0: more than in {view.a}."
    return Figure("changes", "Changes by layer", caption, [], panels, small=True)


def _panel(
    key: str, title: str, curves: Mapping[str, Mapping[int, float]], styles: Styles, by: str, *, log: bool = False,
    limit: float | None = None, full: bool = False, small: bool = False, spread: Mapping[int, float] | None = None,
) -> str:  # fmt: skip
    size = {"width": 330.0, "height": 235.0} if small else {}
    with panel_of(key, title, **size) as panel:
        last = max(max(curve) for curve in curves.values())
        by_layer(panel.axes, last, by, first=int(by == "block"))  # blocks count from 1
        values = [value for curve in curves.values() for value in curve.values()]
        set_scale(panel.axes, [*values, *([limit] if limit and not full else [])], log=log, full=full)
        if limit is not None:
            panel.axes.axhline(limit, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        if small:
            panel.axes.axhline(0, color=MUTED, linewidth=1)
        for name, curve in curves.items():
            if spread:
                _band(panel, curve, spread, styles[name][0])
            _curve(panel, name, curve, styles, by)
    return panel.svg


def _band(panel: Panel, curve: Mapping[int, float], spread: Mapping[int, float], colour: str) -> None:
    at, middle = list(curve), np.array(list(curve.values()))
    wide = np.nan_to_num(np.array([spread.get(layer, np.nan) for layer in at], dtype=float))
    low, high = middle - wide, middle + wide
    panel.axes.fill_between(at, low, high, color=colour, alpha=0.16, linewidth=0)
    bottom, top = panel.axes.get_ylim()
    panel.axes.set_ylim(min(bottom, float(low.min())), max(top, float(high.max())))


def _curve(panel: Panel, name: str, curve: Mapping[int, float], styles: Styles, by: str) -> None:
    at, values = list(curve), list(curve.values())
    draw_line(panel.axes, at, np.maximum(values, lowest(panel.axes)).tolist(), styles[name], linewidth=2)
    texts = [f"{name}, {by} {place}: {number(value, 3)}" for place, value in curve.items()]
    draw_marks(panel, at, values, styles[name][0], texts, hollow=[False] * len(at))
    most = max(curve, key=lambda place: curve[place])
    panel.words.append(f"{name} up to {number(curve[most])} at {by} {most}")


def _keys(styles: Styles) -> list[Key]:
    return [Key(name, THEME[colour], svg_dashes(dashes)) for name, (colour, dashes) in styles.items()]
