"""The figures of the report: small panels, side by side on a desk and below each other on a phone."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from rc_probe.registry import MASSIVE, METRICS, PAPER, WHOLE
from rc_probe.results.curves import BULK, RESIDUAL, Curve, Curves
from rc_probe.results.words import WEIGHTS, number, power_of_ten

from .canvas import fitted, panel_of
from .panels import (
    STYLES,
    Figure,
    Key,
    Styles,
    by_layer,
    draw,
    draw_floor,
    draw_line,
    draw_marks,
    ends,
    keys_of,
    set_scale,
    spelt,
    svg_dashes,
)
from .svg import ACCENT, BASE_SIZE, FG, MUTED, SAN, SAN_MLP, THEME, TRANSFORMER

MOST_PANELS, MOST_ROWS = 12, 40  # what a figure of ablations holds; the tables hold all


_ALL_TOKENS = "all tokens (the paper’s residual)"


def residual_figure(
    found: Curves, init_seeds: pd.DataFrame, metric: str, beside: Mapping[str, Curve], *, apart: bool
) -> Figure | None:
    """The paper's figure: its variants by layer, pretrained beside init, on a linear and on a log scale.

    beside: the whole model's residual of all tokens by weights, where massive tokens make it another
    apart: somewhere in `found` it is another
    """
    shown = [weights for weights in WEIGHTS if any(key[0] == weights for key in found)]
    if not shown:
        return None
    variants = [variant for variant in PAPER if any(key[1] == variant for key in found)]
    panels = []
    init_seeds = init_seeds[init_seeds["metric"] == metric]
    for scale in ("linear", "log"):
        for weights in shown:
            part = {v: found[weights, v] for v in variants if (weights, v) in found}
            panels.append(
                _residual_panel(
                    init_seeds, weights, part, beside, [*found.values(), *beside.values()], log=scale == "log"
                )
            )
    keys = keys_of(variants)
    keys += [Key(_ALL_TOKENS, THEME[FG], width=1.2)] if beside else []
    seeds = _seeds(init_seeds)
    if any(math.isfinite(std) for curve in found.values() for std in curve.stds):
        over = "samples and seeds" if seeds > 1 and "init" in shown else "samples"
        keys.append(Key(f"± 1 std over {over}", THEME[MUTED], band=True))
    keys.append(Key("rounding floor", THEME[MUTED], svg_dashes((3, 2))))
    caption = (
        "How far each layer’s token matrix is from one whose tokens are all equal: 0 is full collapse. "
        f"{_which(metric, apart, bool(beside))}{_means(seeds)}{spelt(variants)} Below the rounding floor (hatched, hollow marks) a number is noise."
    )
    title = METRICS[metric if apart else RESIDUAL].title
    return Figure("residual", f"{title} by layer", caption, keys, panels)


def _which(metric: str, apart: bool, beside: bool) -> str:
    """Which residual is drawn: of the bulk or of all tokens."""
    if metric != BULK:
        return ""
    if not apart:
        return (
            "No token is massive: the bulk is all tokens, and this is the residual as the paper defines it. "
        )
    thin = " The thin line is the whole model with all tokens, as the paper defines it." if beside else ""
    return f"Drawn is the bulk: all tokens but massive ones, of over {MASSIVE} times the median norm.{thin} "


def _seeds(init_seeds: pd.DataFrame) -> int:
    """How many initialisations the curves of init are made of."""
    return max(1, int(init_seeds["seed"].nunique()))


def _means(seeds: int) -> str:
    return (
        "Mean over samples."
        if seeds < 2
        else f"Mean over samples, and over {seeds} seeds where freshly initialised."
    )


def _residual_panel(
    seeds: pd.DataFrame, weights: str, part: Mapping[str, Curve], beside: Mapping[str, Curve],
    every: list[Curve], *, log: bool,
) -> str:  # fmt: skip
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
            _draw_seeds(panel.axes, seeds)
        if weights in beside:  # below the others: seen where it is another
            thin = {_ALL_TOKENS: beside[weights]}
            draw(panel, thin, {_ALL_TOKENS: (FG, ())}, band=False, width=1, size=2.4)
        draw(panel, part)
    return panel.svg


def _draw_seeds(axes: Axes, table: pd.DataFrame) -> None:
    """A thin line for each initialisation."""
    if table.empty:
        return
    rows = table[table["variant"].isin(PAPER)].sort_values("layer")
    for (variant, _), line in rows.groupby(["variant", "seed"], sort=False):
        style = (STYLES[str(variant)][0], ())
        draw_line(axes, line["layer"].tolist(), line["mean"].tolist(), style, linewidth=0.7, alpha=0.5)


_TRUE, _PLAIN, _CUBE, _BOUND = (
    "cancellation-free",
    "plain arithmetic",
    "cube of the layer before",
    "one-layer bound",
)
_RECURSION: Styles = {
    _BOUND: (SAN_MLP, (6.5, 2, 1.2, 2)), _PLAIN: (MUTED, (5, 2.2)), _TRUE: (SAN, ()), _CUBE: (TRANSFORMER, (1.2, 1.8)),
}  # fmt: skip


def recursion_figure(table: pd.DataFrame, bounds: pd.DataFrame) -> Figure | None:
    """Pure attention below the float floor: the recursion, plain arithmetic, the cubic law, the one-layer bound."""
    if table.empty:
        return None
    keys = [Key(name, THEME[_RECURSION[name][0]], svg_dashes(_RECURSION[name][1]))
            for name in (_TRUE, _PLAIN, _CUBE)]  # fmt: skip
    caption = (
        "Pure attention (SAN, self-attention network) on the first sample, computed without cancellation. Plain arithmetic stops at "
        "its rounding floor; the true residual goes on below it."
    )
    if len(bounds):
        colour, dashes = _RECURSION[_BOUND]
        keys.append(Key(f"{_BOUND}, hollow where vacuous", THEME[colour], svg_dashes(dashes)))
        caption += (
            " The one-layer bound starts from the measured residual that enters the layer; it is drawn as many "
            "times above the residual as it is above what it bounds."
        )
    panels = [
        _recursion_panel(weights, rows.sort_values("layer"), bounds[bounds["weights"] == weights])
        for weights in WEIGHTS
        if len(rows := table[table["weights"] == weights])
    ]
    return Figure("recursion", "Below the float floor", caption, keys, panels)


def _logs(values: pd.Series) -> np.ndarray:
    """log10 of what is above zero, NaN elsewhere. Below the smallest float there are logarithms only."""
    numbers = values.astype(float).to_numpy()
    return np.log10(numbers, out=np.full(len(numbers), np.nan), where=numbers > 0)


def _recursion_panel(weights: str, rows: pd.DataFrame, bounds: pd.DataFrame) -> str:
    merged = rows.merge(bounds, on="layer", how="left", suffixes=("", "_of_bound"))
    true = _logs(merged["residual"])
    heights = {
        _BOUND: true + _logs(merged["bound_out"]) - _logs(merged["residual_out"]),
        _PLAIN: _logs(merged["residual_direct"]),
        _TRUE: true,
        _CUBE: np.append(np.nan, 3 * true[:-1]),
    }
    vacuous = merged["vacuous"].eq(True).to_numpy()
    with panel_of(f"c{weights[0]}", WEIGHTS[weights]) as panel:
        by_layer(panel.axes, int(rows["layer"].iloc[-1]))
        for name, values in heights.items():
            known = np.isfinite(values)
            if not known.any():
                continue
            layers, drawn, reasons = (
                merged["layer"][known].tolist(),
                values[known].tolist(),
                merged["reason"][known],
            )
            hollow = (vacuous[known] if name == _BOUND else np.zeros(len(layers), dtype=bool)).tolist()
            draw_line(panel.axes, layers, drawn, _RECURSION[name], linewidth=2.6 if name == _TRUE else 1.8)
            numbers = [_from_log(value) for value in drawn]
            texts = [
                f"{name[0].upper()}{name[1:]}, layer {layer}: {value}"
                + (f", vacuous: {reason}" if empty else "")
                for layer, value, empty, reason in zip(layers, numbers, hollow, reasons, strict=True)
            ]
            draw_marks(panel, layers, drawn, _RECURSION[name][0], texts, hollow=hollow)
            panel.words.append(
                f"{name} {numbers[0]} at layer {layers[0]}, {numbers[-1]} at layer {layers[-1]}"
            )
        panel.axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        panel.axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: power_of_ten(round(v))))
    return panel.svg


def _from_log(exponent: float) -> str:
    if exponent > -300:
        return number(10**exponent, 3)
    whole = math.floor(exponent)  # the cube is below the smallest float
    return f"{10 ** (exponent - whole):.2f}×{power_of_ten(whole)}"


def metrics_figure(by_metric: Mapping[str, Curves], init_seeds: pd.DataFrame, metric: str) -> Figure | None:
    """Every other metric by layer: the four variants pretrained, the transformer at init, ablations thin."""
    panels = []
    variants: set[str] = set()
    fresh = ablated = False
    for name in METRICS:
        found = by_metric.get(name) if name != metric else None
        if not found:
            continue
        weights = min((key[0] for key in found), key=lambda w: w != "pretrained")
        own = {variant: curve for (w, variant), curve in found.items() if w == weights}
        init = found.get(("init", WHOLE)) if weights == "pretrained" else None
        panels.append(_metric_panel(name, own, init))
        variants |= set(own) & set(PAPER)
        fresh |= init is not None
        ablated |= bool(set(own) - set(PAPER))
    if not panels:
        return None
    keys = keys_of([variant for variant in PAPER if variant in variants])
    keys += [Key("transformer, freshly initialised", THEME[MUTED], svg_dashes((5, 2.2)))] if fresh else []
    keys += [Key("an ablation", THEME[MUTED])] if ablated else []
    slow = [metric.title for name, metric in METRICS.items() if metric.cost != "cheap" and name in by_metric]
    few = f" On fewer samples, for they cost more: {', '.join(slow)}."
    caption = _means(_seeds(init_seeds)) + spelt(variants) + (few if slow else "")
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
        draw(panel, {v: own[v] for v in PAPER if v in own}, band=False, width=1.7)
    return panel.svg


def ablation_figure(found: Curves) -> Figure | None:
    """What each ablation asked for does to the residual: at the last layer, then layer by layer."""
    whole = found.get(("pretrained", WHOLE))
    ablated = {v: c for (w, v), c in found.items() if w == "pretrained" and v not in PAPER}
    if whole is None or not ablated:
        return None
    panels = [_change_panel(whole, dict(list(ablated.items())[:MOST_ROWS]))]
    shown = list(ablated.items())[:MOST_PANELS]
    for place, (variant, curve) in enumerate(shown):
        values = [*whole.means, *curve.means]
        above = [value for value in values if value > 0] or [1.0]
        log = max(above) > 50 * min(above)  # of its own: one that collapses would flatten all the others
        title = variant + (", log scale" if log else "")
        with panel_of(f"a{place}", title, width=330, height=220) as panel:
            by_layer(panel.axes, whole.layers[-1])
            set_scale(panel.axes, values, log=log, full=True)
            draw(panel, {WHOLE: whole}, band=False, width=1.5)
            draw(panel, {variant: curve}, {variant: (ACCENT, ())})
        panels.append(panel.svg)
    rest = len(ablated) - len(shown)
    caption = "The relative residual with parts of the pretrained model off, everything else as it was."
    caption += f" {rest} more ablations are in the tables." if rest else ""
    keys = [Key(WHOLE, THEME[TRANSFORMER]), Key("ablated", THEME[ACCENT])]
    return Figure(
        "ablations", "With parts of the model off", caption, keys, panels, small=True, tall=len(panels) > 3
    )


def _change_panel(whole: Curve, ablated: dict[str, Curve]) -> str:
    """A row per ablation: from the model's own value at the last layer to the ablated one."""
    start = whole.means[-1]
    values = [curve.means[-1] for curve in ablated.values()]
    title = f"Residual at layer {whole.layers[-1]}"
    with panel_of("change", title, width=330, height=70 + 34 * len(values)) as panel:
        axes, panel.grid = panel.axes, "x"
        axes.set_xlim(0, max([1.0, start, *values]) * 1.04)
        axes.axvline(start, color=TRANSFORMER, linewidth=1.5)
        for row, (variant, curve) in enumerate(ablated.items()):
            value = curve.means[-1]
            text = f"{variant}: {number(start)} → {number(value)}"
            axes.plot([start, value], [row, row], color=ACCENT, linewidth=2)
            axes.plot([value], [row], linestyle="none", marker="o", ms=7, mfc=ACCENT, mec=(0, 0, 0, 0), mew=6, clip_on=False,
                      gid=panel.hover([text]))  # fmt: skip
            axes.text(0.0, row - 0.3, f"{fitted(variant, 260)}: {number(value)}", transform=axes.get_yaxis_transform(),
                      fontsize=float(BASE_SIZE), color=FG, va="bottom")  # fmt: skip
            panel.words.append(text)
        axes.set_ylim(len(values) - 0.6, -1.0)
        axes.yaxis.set_major_locator(NullLocator())
    return panel.svg
