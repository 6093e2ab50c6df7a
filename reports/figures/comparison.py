"""The figures of a comparison: one curve a run, and the residual over training."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, MaxNLocator

from rc_probe.registry import METRICS
from rc_probe.results.curves import Curve
from rc_probe.results.words import number

from .canvas import Panel, panel_of
from .heat import WIDE, draw_heat
from .panels import (
    Dashes,
    Figure,
    Key,
    Styles,
    by_layer,
    draw_line,
    draw_marks,
    lowest,
    set_scale,
    svg_dashes,
)
from .svg import HEAT, MORE, MUTED, SAN, SAN_MLP, SAN_SKIP, THEME, TRANSFORMER

COLOURS = (TRANSFORMER, SAN, SAN_SKIP, SAN_MLP, *MORE)
DASHES: tuple[Dashes, ...] = ((), (5, 2.2), (1.2, 1.8), (6.5, 2, 1.2, 2))
MOST_CURVES = len(COLOURS) * len(DASHES)  # told apart by colour and dashes
MOST_CELLS, SHADES = 1500, 10
WHAT = (
    "The relative residual of the whole model (of its bulk, without massive tokens, where every run has it), pretrained "
    "weights, mean over samples: 0 is full collapse."
)
NOISE = "Hollow marks are rounding noise."


def styles_of(names: list[str]) -> Styles:
    """A colour and dashes for each name; no two are the same."""
    count = len(COLOURS)
    return {
        name: (COLOURS[i % count], DASHES[(i + i // count) % len(DASHES)]) for i, name in enumerate(names)
    }


def curves_figure(found: Mapping[str, Curve]) -> Figure | None:
    """A curve for each run by layer, linear and log; by relative depth too where depths differ."""
    if not found:
        return None
    shown = dict(list(found.items())[:MOST_CURVES])
    styles = styles_of(list(shown))
    several = len({curve.layers[-1] for curve in shown.values()}) > 1
    panels = [
        _curves_panel(shown, styles, log=log, relative=relative)
        for relative in ((False, True) if several else (False,))
        for log in (False, True)
    ]
    rest = len(found) - len(shown)
    caption = f"{WHAT} {NOISE}" + (f" {rest} more runs are in the tables." if rest else "")
    return Figure("runs", "Relative residual of every run", caption, _keys(styles), panels)


def _curves_panel(shown: Mapping[str, Curve], styles: Styles, *, log: bool, relative: bool) -> str:
    name = f"k{'d' if relative else 'l'}{'log' if log else 'lin'}"
    title = ("By relative depth" if relative else "By layer") + (", log scale" if log else "")
    with panel_of(name, title) as panel:
        by_layer(panel.axes, max(curve.layers[-1] for curve in shown.values()))
        if relative:
            panel.axes.set_xlabel("layer / layers")
            panel.axes.set_xlim(-0.02, 1.02)
            panel.axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        set_scale(panel.axes, [v for c in shown.values() for v in c.means], log=log, full=True)
        for run, curve in shown.items():
            last = max(curve.layers[-1], 1) if relative else 1
            xs = [layer / last for layer in curve.layers]
            texts = [
                f"{run}, layer {layer}: {number(value, 3)}"
                for layer, value in zip(curve.layers, curve.means, strict=True)
            ]
            hollow = [curve.at_floor(i) for i in range(len(curve.layers))]
            _line(panel, run, xs, curve.means, styles, texts, hollow)
            panel.words.append(f"{run} {number(curve.means[0])} to {number(curve.means[-1])}")
    return panel.svg


def _line(
    panel: Panel, name: str, xs: list[float], values: list[float], styles: Styles, texts: list[str],
    hollow: list[bool],
) -> None:  # fmt: skip
    draw_line(panel.axes, xs, np.maximum(values, lowest(panel.axes)).tolist(), styles[name], linewidth=2)
    draw_marks(panel, xs, values, styles[name][0], texts, hollow=hollow)


def training_figures(steps: list[int], found: list[Curve]) -> list[Figure]:
    """The residual over training: of the first, middle and last layer, and of every layer as a heat map."""
    table = pd.DataFrame([dict(zip(curve.layers, curve.means, strict=True)) for curve in found]).sort_index(
        axis="columns"
    )
    noise = [{curve.layers[i]: curve.at_floor(i) for i in range(len(curve.layers))} for curve in found]
    return [_lines_figure(steps, table, noise), _map_figure(steps, table)]


def changes_figure(frame: pd.DataFrame, names: list[str]) -> Figure | None:
    """For each metric its change from the first run by layer; the runs in the colours of their curves.

    frame: the table `changes`. names: of all runs, the first is what they are compared with
    """
    shown = names[:MOST_CURVES]
    styles = styles_of(shown)
    frame = frame[frame["run"].isin(shown)]
    panels = [
        _changes_panel(f"d{place}", METRICS[metric].title, frame[frame["metric"] == metric], styles)
        for place, metric in enumerate(METRICS)
        if metric in set(frame["metric"])
    ]
    if not panels:
        return None
    keys = _keys({name: styles[name] for name in shown if name in set(frame["run"])})
    caption = f"Above 0: more than in {names[0]}. Hollow marks: the change is within rounding noise."
    return Figure("changes", "Changes by layer", caption, keys, panels, small=True)


def _changes_panel(name: str, title: str, frame: pd.DataFrame, styles: Styles) -> str:
    with panel_of(name, title, width=330, height=235) as panel:
        by_layer(panel.axes, int(frame["layer"].max()))
        set_scale(panel.axes, frame["change"].tolist(), log=False)
        panel.axes.axhline(0, color=MUTED, linewidth=1)
        for run, rows in frame.groupby("run", sort=False):
            layers, changes = rows["layer"].tolist(), rows["change"].tolist()
            texts = [f"{run}, layer {at}: {number(by, 3)}" for at, by in zip(layers, changes, strict=True)]
            hollow = (rows["change"].abs() <= rows["floor"]).tolist()
            _line(panel, str(run), layers, changes, styles, texts, hollow)
            panel.words.append(f"{run} {number(changes[-1])} at layer {layers[-1]}")
    return panel.svg


def _keys(styles: Styles) -> list[Key]:
    return [Key(name, THEME[colour], svg_dashes(dashes)) for name, (colour, dashes) in styles.items()]


def _lines_figure(steps: list[int], table: pd.DataFrame, noise: list[dict[int, bool]]) -> Figure:
    layers = [int(layer) for layer in table.columns.to_numpy()]
    chosen = dict.fromkeys([layers[0], layers[len(layers) // 2], layers[-1]])
    looks = ((SAN_SKIP, DASHES[2]), (SAN_MLP, DASHES[1]), (TRANSFORMER, DASHES[0]))
    styles = {f"layer {layer}": look for layer, look in zip(chosen, looks, strict=False)}
    panels = []
    for log in (False, True):
        title = "Over training" + (", log scale" if log else "")
        with panel_of(f"t{'log' if log else 'lin'}", title) as panel:
            values = table[list(chosen)].to_numpy().ravel().tolist()
            set_scale(panel.axes, values, log=log, full=True)
            _by_step(panel.axes, steps)
            for layer in chosen:
                name, line = f"layer {layer}", table[layer].tolist()
                texts = [f"step {s}, {name}: {number(v, 3)}" for s, v in zip(steps, line, strict=True)]
                hollow = [row.get(layer, False) for row in noise]
                _line(panel, name, [float(step) for step in steps], line, styles, texts, hollow)
                panel.words.append(f"{name} {number(line[0])} to {number(line[-1])}")
        panels.append(panel.svg)
    return Figure("training", "Relative residual over training", f"{WHAT} {NOISE}", _keys(styles), panels)


def _by_step(axes: Axes, steps: list[int]) -> None:
    """Training steps along x, on a log scale from the first step on where they span more than 1:50."""
    positive = [step for step in steps if step > 0]
    axes.set_xlabel("training step")
    if positive and max(positive) > 50 * min(positive):
        axes.set_xscale("symlog", linthresh=min(positive))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _map_figure(steps: list[int], table: pd.DataFrame) -> Figure:
    """Layers upwards, checkpoints to the right, in equal widths."""
    every = math.ceil(len(steps) * table.shape[1] / MOST_CELLS)
    kept = sorted({*range(0, len(steps), every), len(steps) - 1})
    values = table.iloc[kept].to_numpy(dtype=float).T  # (layers, checkpoints)
    steps = [steps[i] for i in kept]
    with panel_of("heat", "By layer and step", width=820, height=330) as panel:
        _heat(panel, values, steps, [int(layer) for layer in table.columns.to_numpy()])
        axes = panel.axes
        ticks = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 9)).round().astype(int))
        axes.xaxis.set_major_locator(FixedLocator(ticks.tolist()))
        axes.xaxis.set_major_formatter(FixedFormatter([f"{steps[i]:,}" for i in ticks]))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
        axes.set_xlabel("training step (each checkpoint as wide as the others)")
        axes.set_ylabel("layer")
    caption = (
        f"{WHAT} The colours always go from 0 (stands out from the page) to 1; above 1 they are those of 1."
    )
    caption += f" Every {every}. checkpoint is drawn; the tables hold all." if every > 1 else ""
    return Figure("map", "Every layer over training", caption, [], [panel.svg], wide=True)


def _heat(panel: Panel, values: np.ndarray, steps: list[int], layers: list[int]) -> None:
    edges = np.linspace(0, 1, SHADES + 1)
    colours = HEAT[: -SHADES - 1 : -1]  # what is low stands out
    texts = [
        f"step {step}, layer {layer}: {number(values[row, column], 3)}"
        for row, layer in enumerate(layers)
        for column, step in enumerate(steps)
    ]
    xs, ys = np.arange(len(steps) + 1) - 0.5, np.append(np.array(layers) - 0.5, layers[-1] + 0.5)
    marks = range(0, SHADES + 1, 2)
    draw_heat(
        panel,
        values,
        edges,
        colours,
        xs=xs,
        ys=ys,
        texts=texts,
        bar=WIDE,
        marks=marks,
        upwards=True,
        label="{:g}".format,
    )
    known = values[np.isfinite(values)]
    if known.size:
        panel.words.append(f"from {number(float(known.min()))} to {number(float(known.max()))}")
