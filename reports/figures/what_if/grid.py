"""Masks or norms in several networks: three panels for each network by layer, then what holds at the last layer."""

import math
from collections.abc import Mapping

import pandas as pd
from matplotlib.ticker import NullLocator

from rc_probe.reports.figures.canvas import Panel, panel_of
from rc_probe.reports.figures.comparison import styles_of
from rc_probe.reports.figures.panels import (
    Figure,
    Key,
    Styles,
    by_layer,
    draw,
    draw_floor,
    draw_line,
    draw_marks,
    set_scale,
    spelt,
    svg_dashes,
)
from rc_probe.reports.figures.svg import BASE_SIZE, FG, MUTED, THEME
from rc_probe.results.curves import Curve
from rc_probe.results.findings.importance_words import UNITS, criterion, title_of
from rc_probe.results.findings.what_if_words import ABSOLUTE, RELATIVE, curve_of, slopes
from rc_probe.results.words import number, signed

SIZE = {"width": 430, "height": 280}
WIDE = 30  # the ratio of values from which on a scale is a log scale
LAST = ("effective_rank", "cosine", "cosine_absolute")
CAPTION = (
    "For each network the relative residual of the bulk, the absolute residual ‖res X‖_F beside it, and the slope of the logarithm of the "
    "first, layer by layer; then each network at the last layer. The absolute one mixes collapse with the size of the weights: "
    "where the two disagree, it is the size that changes."
)
NETS = " “− norm”: every norm of the blocks is left out; “− skip”: every skip. Means over samples; noise is drawn hollow, and has no slope."


def grid_figure(frame: pd.DataFrame, kind: str) -> Figure | None:
    """frame: the table `masks` or `norms`; kind: its first column, `mask` or `norm`."""
    names, nets = (list(dict.fromkeys(map(str, frame[column]))) for column in (kind, "network"))
    if not names:
        return None
    styles, panels = styles_of(names), []
    for place, net in enumerate(nets):
        own = frame[frame["network"] == net]
        relative, absolute = (
            {name: curve for name in names if (curve := curve_of(own[own[kind] == name], metric))}
            for metric in (RELATIVE, ABSOLUTE)
        )
        panels += [
            _curves(f"{kind[0]}{place}r", f"{net}: relative", relative, styles),
            _curves(f"{kind[0]}{place}a", f"{net}: absolute", absolute, styles, floor=False),
            _slopes(f"{kind[0]}{place}s", f"{net}: log-slope", relative, styles),
        ]
    for place, (title, unit, found) in enumerate(_at_last(frame, kind)):
        panels.append(_dots(f"{kind[0]}l{place}", title, unit, found, nets, styles))
    keys = [Key(name, THEME[styles[name][0]], svg_dashes(styles[name][1])) for name in names]
    keys.append(Key("rounding floor", THEME[MUTED], svg_dashes((3, 2))))
    what = {"mask": "With other masks", "norm": "With other norms"}[kind]
    return Figure(f"{kind}s", what, CAPTION + spelt(["SAN"]) + NETS, keys, panels, small=True)


def _curves(name: str, title: str, shown: Mapping[str, Curve], styles: Styles, *, floor: bool = True) -> str:
    values = [value for curve in shown.values() for value in curve.means]
    above = [value for value in values if value > 0] or [1.0]
    log = max(above) > WIDE * min(above)
    with panel_of(name, title + (", log scale" if log else ""), **SIZE) as panel:
        by_layer(panel.axes, max((curve.layers[-1] for curve in shown.values()), default=1))
        floor = floor and log
        floors = [value for curve in shown.values() for value in curve.floors] if floor else []
        set_scale(panel.axes, values + floors, log=log)
        if floor:
            draw_floor(panel, list(shown.values()))
        draw(panel, shown, styles, band=False, width=1.6, size=3.6)
    return panel.svg


def _slopes(name: str, title: str, shown: Mapping[str, Curve], styles: Styles) -> str:
    """ln of the residual at a layer minus that at the layer before: −1 loses a factor e."""
    found = {name: slopes(curve) for name, curve in shown.items()}
    with panel_of(name, title, **SIZE) as panel:
        by_layer(panel.axes, max((curve.layers[-1] for curve in shown.values()), default=1))
        values = [value for by in found.values() for value in by.values()]
        set_scale(panel.axes, values, log=False)
        for each, by in found.items():
            layers, heights = list(by), list(by.values())
            draw_line(panel.axes, layers, heights, styles[each], linewidth=1.6)
            texts = [f"{each}, layer {layer}: {signed(value, 3)}" for layer, value in by.items()]
            draw_marks(panel, layers, heights, styles[each][0], texts, hollow=[False] * len(layers), size=3.6)
            if by:
                panel.words.append(f"{each} {signed(min(heights))} at its steepest")
    return panel.svg


Found = dict[tuple[str, str], float]  # by network and mask or norm


def _at_last(frame: pd.DataFrame, kind: str) -> list[tuple[str, str, Found]]:
    """Title, unit and values of each panel of the last layer: ranks, cosines, what the model loses."""
    rows = frame[frame["layer"] == frame["layer"].max()]
    found = []
    for metric in LAST:
        own = rows[(rows["metric"] == metric) & rows["value"].notna()]
        found.append((title_of(metric), "", _values(own, kind, "value")))
    scored = rows[rows["floor"].isna()]
    cost = criterion(scored)
    for metric in dict.fromkeys(metric for metric in (cost, "agreement") if metric):
        own = scored[(scored["metric"] == metric) & scored["change"].notna()]
        name = f"{title_of(metric)}, change" if metric == cost else title_of(metric)
        found.append(
            (name, UNITS.get(metric, ""), _values(own, kind, "change" if metric == cost else "value"))
        )
    return [each for each in found if each[2]]


def _values(rows: pd.DataFrame, kind: str, column: str) -> Found:
    return {
        (str(net), str(name)): float(value)
        for net, name, value in rows[["network", kind, column]].itertuples(index=False, name=None)
    }


def _dots(name: str, title: str, unit: str, found: Found, nets: list[str], styles: Styles) -> str:
    """A row for each network, a mark for each mask or norm."""
    values = list(found.values())
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + 1
    with panel_of(name, title, width=SIZE["width"], height=66 + 34 * len(nets)) as panel:
        axes, panel.grid = panel.axes, "x"
        axes.set_xlim(low - 0.03 * (high - low), high + 0.04 * (high - low))
        for row, net in enumerate(nets):
            _row(panel, row, net, {each: v for (one, each), v in found.items() if one == net}, unit, styles)
        axes.set_ylim(len(nets) - 0.6, -0.8)
        axes.yaxis.set_major_locator(NullLocator())
    return panel.svg


def _row(panel: Panel, row: int, net: str, values: Mapping[str, float], unit: str, styles: Styles) -> None:
    axes = panel.axes
    axes.axhline(row, color=MUTED, linewidth=0.6, alpha=0.6)
    axes.text(0.0, row - 0.22, net, transform=axes.get_yaxis_transform(), fontsize=float(BASE_SIZE), color=FG, va="bottom")  # fmt: skip
    for each, value in values.items():
        if math.isfinite(value):
            gid = panel.hover([f"{net}, {each}: {number(value, 3)}{unit}"])
            axes.plot([value], [row], linestyle="none", marker="o", ms=7, mfc=styles[each][0], mec=(0, 0, 0, 0), mew=5, clip_on=False, gid=gid)  # fmt: skip
    finite = {each: value for each, value in values.items() if math.isfinite(value)}
    if finite:
        least, most = min(finite, key=lambda k: finite[k]), max(finite, key=lambda k: finite[k])
        panel.words.append(
            f"{net} from {number(finite[least])}{unit} ({least}) to {number(finite[most])}{unit} ({most})"
        )
