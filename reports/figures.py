"""The figures of the report: small panels, side by side on a desk and below each other on a phone."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from rc_probe.registry import METRICS

from .panels import (
    STYLES,
    Dashes,
    Figure,
    Key,
    by_layer,
    draw,
    draw_floor,
    ends,
    keys_of,
    panel_of,
    set_scale,
    svg_dashes,
)  # fmt: skip
from .svg import ACCENT, FG, MUTED, SAN, THEME, TRANSFORMER
from .verdict import METRIC, PAPER, Curve, Result, curves, number, power_of_ten

MOST_PANELS, MOST_ROWS = 12, 40  # what a figure of ablations holds; the tables hold all
WEIGHTS = {"pretrained": "Pretrained", "init": "Freshly initialised"}


def residual_figure(result: Result) -> Figure | None:
    """The paper's figure: four variants by layer, pretrained beside init, on a linear and on a log scale."""
    found = {key: curve for key, curve in curves(result).items() if key[1] in PAPER}
    shown = [weights for weights in WEIGHTS if any(key[0] == weights for key in found)]
    if not shown:
        return None
    variants = [variant for variant in PAPER if any(key[1] == variant for key in found)]
    panels = []
    for scale in ("linear", "log"):
        for weights in shown:
            part = {v: found[weights, v] for v in variants if (weights, v) in found}
            panels.append(_residual_panel(result, weights, part, list(found.values()), log=scale == "log"))
    keys = keys_of(variants)
    if any(math.isfinite(std) for curve in found.values() for std in curve.stds):
        keys.append(Key("± 1 std over samples", THEME[MUTED], band=True))
    keys.append(Key("rounding floor", THEME[MUTED], svg_dashes((3, 2))))
    caption = (
        "How far each layer’s token matrix is from one whose tokens are all equal: 0 is full collapse. "
        "Mean over samples. Below the rounding floor (hatched, hollow marks) a number is noise."
    )
    return Figure("residual", "Relative residual by layer", caption, keys, panels)


def _residual_panel(
    result: Result, weights: str, part: Mapping[str, Curve], every: list[Curve], *, log: bool
) -> str:
    name = f"r{weights[0]}{'log' if log else 'lin'}"
    title = WEIGHTS[weights] + (", log scale" if log else "")
    with panel_of(name, title) as panel:
        by_layer(panel.axes, max(curve.layers[-1] for curve in every))
        tops = [m + s for curve in every for m, s in zip(curve.means, curve.stds, strict=True)]
        values = [value for curve in every for value in curve.means] + tops
        floors = [floor for c in every for floor in c.floors] if log else []
        set_scale(panel.axes, values + floors, log=log, full=True)  # one scale for all panels of a row
        draw_floor(panel, list(part.values()))
        if weights == "init":
            _draw_seeds(panel.axes, result.tables.get("init_seeds"))
        for variant, curve in part.items():
            draw(panel, variant, curve, colour=STYLES[variant][0], dashes=STYLES[variant][1])
    return panel.svg


def _draw_seeds(axes: Axes, table: pd.DataFrame | None) -> None:
    """A thin line for each further initialisation."""
    if table is None or table.empty:
        return
    rows = table[(table["metric"] == METRIC) & table["variant"].isin(PAPER)]
    for (_, variant), group in rows.groupby(["seed", "variant"], sort=True):
        ordered = group.sort_values("layer")
        axes.plot(ordered["layer"], ordered["mean"], color=STYLES[str(variant)][0], linewidth=0.7, alpha=0.5)


def recursion_figure(result: Result) -> Figure | None:
    """Pure attention below the float floor: the recursion, plain arithmetic, and the cubic law."""
    table = result.tables.get("recursion")
    if table is None or table.empty:
        return None
    panels = [
        _recursion_panel(weights, table[table["weights"] == weights].sort_values("layer"))
        for weights in WEIGHTS
        if (table["weights"] == weights).any()
    ]
    caption = (
        "Pure attention (SAN) on the first sample, computed without cancellation. Plain arithmetic stops at "
        "its rounding floor; the true residual goes on below it. Dotted: the cube of the layer before."
    )
    keys = [
        Key("cancellation-free", THEME[SAN]),
        Key("plain arithmetic", THEME[MUTED], svg_dashes((5, 2.2))),
        Key("cube of the layer before", THEME[TRANSFORMER], svg_dashes((1.2, 1.8))),
    ]
    return Figure("recursion", "Below the float floor", caption, keys, panels)


def _recursion_panel(weights: str, rows: pd.DataFrame) -> str:
    def logs(values: pd.Series, power: int = 1) -> np.ndarray:
        numbers = values.astype(float).to_numpy()
        return power * np.log10(np.where(numbers > 0, numbers, np.nan))

    x = rows["layer"].to_numpy()
    true, plain = logs(rows["residual"]), logs(rows["residual_direct"])
    cube = logs(rows["residual"].shift(), 3)
    with panel_of(f"c{weights[0]}", WEIGHTS[weights]) as panel:
        by_layer(panel.axes, int(x[-1]))
        lines: tuple[tuple[str, np.ndarray, str, Dashes, float], ...] = (
            ("Plain arithmetic", plain, MUTED, (5, 2.2), 1.8),
            ("Cancellation-free", true, SAN, (), 2.6),
            ("Cube of the layer before", cube, TRANSFORMER, (1.2, 1.8), 1.8),
        )
        for name, y, colour, dashes, width in lines:
            known = np.flatnonzero(np.isfinite(y))
            if not len(known):
                continue
            panel.axes.plot(x[known], y[known], color=colour, linewidth=width,
                            linestyle=(0, dashes) if dashes else "-")  # fmt: skip
            values = [_from_log(y[i]) for i in known]
            gid = panel.hover([f"{name}, layer {x[i]}: {v}" for i, v in zip(known, values, strict=True)])
            panel.axes.plot(x[known], y[known], linestyle="none", marker="o", ms=4.6, mfc=colour,
                            mec=(0, 0, 0, 0), mew=7, gid=gid)  # fmt: skip
            first, last = x[known[0]], x[known[-1]]
            panel.words.append(f"{name} {values[0]} at layer {first}, {values[-1]} at layer {last}")
        panel.axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        panel.axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: power_of_ten(round(v))))
    return panel.svg


def _from_log(exponent: float) -> str:
    if exponent > -300:
        return number(10**exponent, 3)
    whole = math.floor(exponent)  # the cube is below the smallest float
    return f"{10 ** (exponent - whole):.2f}×{power_of_ten(whole)}"


def metrics_figure(result: Result) -> Figure | None:
    """Every other metric by layer: the four variants pretrained, the transformer at init, ablations thin."""
    panels = []
    variants: set[str] = set()
    fresh = ablated = False
    for name in METRICS:
        found = curves(result, name) if name != METRIC else {}
        if not found:
            continue
        weights = min((key[0] for key in found), key=lambda w: w != "pretrained")
        own = {variant: curve for (w, variant), curve in found.items() if w == weights}
        init = found.get(("init", "transformer")) if weights == "pretrained" else None
        panels.append(_metric_panel(name, own, init))
        variants |= set(own) & set(PAPER)
        fresh |= init is not None
        ablated |= bool(set(own) - set(PAPER))
    if not panels:
        return None
    keys = keys_of([variant for variant in PAPER if variant in variants])
    keys += [Key("transformer, freshly initialised", THEME[MUTED], svg_dashes((5, 2.2)))] if fresh else []
    keys += [Key("an ablation", THEME[MUTED])] if ablated else []
    slow = [
        metric.title for name, metric in METRICS.items() if metric.cost != "cheap" and curves(result, name)
    ]
    few = f" On fewer samples, for they cost more: {', '.join(slow)}."
    caption = "Mean over samples." + (few if slow else "")
    return Figure("metrics", "Other metrics by layer", caption, keys, panels, small=True)


def _metric_panel(name: str, own: dict[str, Curve], init: Curve | None) -> str:
    every = [*own.values(), *([init] if init else [])]
    values = [value for curve in every for value in curve.means]
    metric = METRICS[name]
    ratio = metric.unit == "ratio"
    log = metric.high is None and min(values) > 0 and max(values) > 100 * min(values)
    title = metric.title + (", log scale" if log else "")
    with panel_of(f"m{list(METRICS).index(name)}", title, width=330, height=235) as panel:
        by_layer(panel.axes, max(curve.layers[-1] for curve in every))
        set_scale(panel.axes, values, log=log, full=ratio)
        for variant, curve in own.items():
            if variant not in PAPER:
                gid = panel.hover([ends(variant, curve)])
                panel.axes.plot(curve.layers, curve.means, color=MUTED, linewidth=0.8, alpha=0.7, gid=gid)
        if init:
            gid = panel.hover([ends("transformer, freshly initialised,", init)])
            panel.axes.plot(init.layers, init.means, color=MUTED, linewidth=1.6, linestyle=(0, (5, 2.2)),
                            gid=gid)  # fmt: skip
        for variant in PAPER:
            if variant in own:
                colour, dashes = STYLES[variant]
                draw(panel, variant, own[variant], colour=colour, dashes=dashes, band=False, width=1.7)
    return panel.svg


def ablation_figure(result: Result) -> Figure | None:
    """What each ablation does to the residual: at the last layer, then layer by layer."""
    found = curves(result)
    whole = found.get(("pretrained", "transformer"))
    ablated = {v: c for (w, v), c in found.items() if w == "pretrained" and v != "transformer"}
    others = {variant: curve for variant, curve in ablated.items() if variant not in PAPER}
    if whole is None or not ablated:
        return None
    panels = [_change_panel(whole, dict(list(ablated.items())[:MOST_ROWS]))]
    shown = list(others.items())[:MOST_PANELS]
    values = [value for curve in (whole, *others.values()) for value in curve.means if value > 0]
    log = max(values) > 50 * min(values)
    for place, (variant, curve) in enumerate(shown):
        with panel_of(f"a{place}", variant, width=330, height=220) as panel:
            by_layer(panel.axes, whole.layers[-1])
            set_scale(panel.axes, values, log=log, full=True)
            draw(panel, "transformer", whole, colour=TRANSFORMER, band=False, width=1.5)
            draw(panel, variant, curve, colour=ACCENT)
        panels.append(panel.svg)
    rest = len(others) - len(shown)
    caption = "The relative residual with parts of the pretrained model off, everything else as it was."
    caption += f" {rest} more ablations are in the tables." if rest else ""
    keys = [Key("transformer", THEME[TRANSFORMER]), Key("ablated", THEME[ACCENT])]
    return Figure(
        "ablations", "With parts of the model off", caption, keys, panels, small=True, tall=len(panels) > 3
    )


def _change_panel(whole: Curve, ablated: dict[str, Curve]) -> str:
    """A row per ablation: from the model's own value at the last layer to the ablated one."""
    start = whole.means[-1]
    values = [curve.means[-1] for curve in ablated.values()]
    log = 0 < min([start, *values]) < max([start, *values]) / 50
    title = f"Residual at layer {whole.layers[-1]}" + (", log scale" if log else "")
    with panel_of("change", title, width=330, height=70 + 34 * len(values)) as panel:
        axes = panel.axes
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=5))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: power_of_ten(round(math.log10(v)))))
        else:
            axes.set_xlim(0, max([1.0, start, *values]) * 1.04)
        axes.axvline(start, color=TRANSFORMER, linewidth=1.5)
        for row, (variant, curve) in enumerate(ablated.items()):
            value = curve.means[-1]
            text = f"{variant}: {number(start)} → {number(value)}"
            axes.plot([start, value], [row, row], color=ACCENT, linewidth=2)
            axes.plot([value], [row], linestyle="none", marker="o", ms=7, mfc=ACCENT, mec=(0, 0, 0, 0), mew=6,
                      gid=panel.hover([text]))  # fmt: skip
            axes.text(0.0, row - 0.3, f"{variant}: {number(value)}", transform=axes.get_yaxis_transform(),
                      fontsize=10.5, color=FG, va="bottom")  # fmt: skip
            panel.words.append(text)
        axes.set_ylim(len(values) - 0.6, -1.0)
        axes.yaxis.set_major_locator(NullLocator())
    return panel.svg
