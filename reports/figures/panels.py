"""What a panel of a figure is drawn with: style, scales, curves with bands and marks, the rounding floor."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from rc_probe.results.curves import Curve
from rc_probe.results.words import number, power_of_ten

from .svg import BASE_SIZE, FG, GRID, MUTED, PANEL, SAN, SAN_MLP, SAN_SKIP, THEME, TRANSFORMER, clean

Dashes = tuple[float, ...]
Styles = Mapping[str, tuple[str, Dashes]]  # colour and dashes of each curve by its name
# The paper's line styles: SAN dotted, SAN+MLP dashed, SAN+skip dash-dot, transformer solid.
STYLES: Styles = {
    "SAN": (SAN, (1.2, 1.8)),
    "SAN+MLP": (SAN_MLP, (5, 2.2)),
    "SAN+skip": (SAN_SKIP, (6.5, 2, 1.2, 2)),
    "transformer": (TRANSFORMER, ()),
}
_RC: dict[Any, Any] = {  # over seaborn's whitegrid
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same layout on every machine
    "font.size": float(BASE_SIZE),
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": float(BASE_SIZE),
    "xtick.labelsize": float(BASE_SIZE),
    "ytick.labelsize": float(BASE_SIZE),
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": FG,
    "axes.facecolor": PANEL,
    "figure.facecolor": PANEL,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": FG,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "hatch.linewidth": 0.6,
    "hatch.color": MUTED,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Key:
    """An entry of a legend: its colour as the page writes it, and its dashes.

    band: a coloured area instead of a line; mark: the path of a mark in a box of 30 × 12, hollow or filled
    """

    label: str
    colour: str
    dashes: str = ""
    band: bool = False
    mark: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Figure:
    """A titled group of panels (SVG text) with one legend."""

    name: str
    title: str
    caption: str
    keys: list[Key] = field(default_factory=list)
    panels: list[str] = field(default_factory=list)
    small: bool = False
    tall: bool = False  # the first panel is beside several others
    wide: bool = False  # one panel over the whole width


@dataclass
class Panel:
    """One panel while it is drawn: its axes, the texts to hover on, and what it shows in words."""

    axes: Axes
    titles: dict[str, list[str]] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    svg: str = ""

    def hover(self, texts: list[str]) -> str:
        """A gid for an artist with `texts` to hover on."""
        gid = f"hover-{len(self.titles)}"
        self.titles[gid] = texts
        return gid


def fitted(text: str, width: float) -> str:
    """`text` cut in its middle where a panel of `width` has no room for it; tables and labels have it whole."""
    most = int((width - 55) / 10.5)  # of bold letters, beside the ticks
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"


@contextmanager
def panel_of(name: str, title: str, *, width: float = 400, height: float = 290) -> Iterator[Panel]:
    """A panel of `width` × `height` in SVG units; its `svg` is there when the context closes."""
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's settings are; the backend stays
        mpl.rcParams.update({**sns.axes_style("whitegrid"), **_RC})
        canvas = Canvas(figsize=(width / 72, height / 72))
        panel = Panel(canvas.subplots())
        panel.axes.set_title(fitted(title, width))
        yield panel
        sns.despine(canvas, left=True)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg")  # its ids and its date do not outlive `clean`
    label = f"{title}. {'; '.join(panel.words)}." if panel.words else title
    panel.svg = clean(buffer.getvalue(), name, label, panel.titles)


def by_layer(axes: Axes, last: int, label: str = "layer") -> None:
    """Layers (or what `label` says) 0 to `last` along x."""
    axes.set_xlabel(label)
    axes.set_xlim(-0.25, last + 0.25)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.grid(False, axis="x")


def set_scale(axes: Axes, values: list[float], *, log: bool, full: bool = False) -> None:
    """Limits and ticks of y for `values`; `full` shows all of 0 to 1 for a ratio on a linear scale."""
    values = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
    low, high = min(values), max(values)
    if log:
        axes.set_yscale("log")
        axes.set_ylim(10.0 ** math.floor(math.log10(low / 4)), max(high, 10 * low) * 1.6)
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: power_of_ten(round(math.log10(v)))))
        return
    low, high = min(0.0, low), max(1.0 if full else 0.0, high)
    high = high if high > low else 1.0
    axes.set_ylim(low - 0.04 * (high - low) * (low < 0), high + 0.04 * (high - low))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))


def ends(name: str, curve: Curve) -> str:
    """Where a curve begins and ends, in words."""
    text = f"{name} {number(curve.means[0])} at layer {curve.layers[0]}"
    return f"{text}, {number(curve.means[-1])} at layer {curve.layers[-1]}" if len(curve.layers) > 1 else text


def _hover(name: str, curve: Curve, index: int) -> str:
    spread, floor = curve.stds[index], curve.floors[index]
    text = f"{name}, layer {curve.layers[index]}: {number(curve.means[index], 3)}"
    text += f" ± {number(spread)}" if math.isfinite(spread) else ""
    return f"{text}, noise (floor {number(floor)})" if curve.at_floor(index) else text


def draw_lines(axes: Axes, frame: pd.DataFrame, styles: Styles, **options: Any) -> None:
    """A line by layer for each `name` in `frame` (columns layer, value, name), drawn in its style.

    options: of `seaborn.lineplot`, such as linewidth, alpha, or units for several lines of one name.
    """
    names = list(frame["name"].unique())
    sns.lineplot(
        frame, x="layer", y="value", hue="name", style="name", hue_order=names, style_order=names, ax=axes,
        palette={name: styles[name][0] for name in names},
        dashes={name: styles[name][1] or "" for name in names},
        estimator=None, errorbar=None, legend=False, **options,
    )  # fmt: skip
    axes.set_ylabel("")


def draw(
    panel: Panel, shown: Mapping[str, Curve], styles: Styles = STYLES, *, band: bool = True, width: float = 2
) -> None:
    """Curves by name with bands of ± 1 std and a mark per layer, hollow where it is rounding noise."""
    if not shown:
        return
    axes = panel.axes
    # On a log scale an exact zero, as half precision gives, lies on the lower edge.
    bottom = axes.get_ylim()[0] if axes.get_yscale() == "log" else -math.inf
    frames = {
        name: pd.DataFrame({
            "layer": curve.layers, "name": name, "value": np.maximum(curve.means, bottom),
            "low": np.maximum(np.subtract(curve.means, curve.stds), bottom),
            "high": np.add(curve.means, curve.stds),
        })
        for name, curve in shown.items()
    }  # fmt: skip
    for name, frame in frames.items():
        if band and frame["high"].notna().any():
            axes.fill_between(frame["layer"], frame["low"], frame["high"], color=styles[name][0], alpha=0.16,
                              linewidth=0)  # fmt: skip
    draw_lines(axes, pd.concat(frames.values()), styles, linewidth=width)
    for name, curve in shown.items():
        noise = [curve.at_floor(i) for i in range(len(curve.layers))]
        texts = [_hover(name, curve, i) for i in range(len(curve.layers))]
        draw_marks(panel, frames[name], styles[name][0], texts, hollow=noise)
        panel.words.append(ends(name, curve))


def draw_marks(
    panel: Panel, frame: pd.DataFrame, colour: str, texts: list[str], *, hollow: Sequence[bool]
) -> None:
    """A mark for each row of `frame` (columns layer, value) with its text to hover on."""
    looks: tuple[dict[str, Any], ...] = (
        {"mfc": colour, "mec": (0, 0, 0, 0), "mew": 7, "ms": 4.6},  # a wide clear edge to hover on
        {"mfc": PANEL, "mec": colour, "mew": 1.1, "ms": 4.8},
    )
    for kind, look in enumerate(looks):
        where = (np.array(hollow) == bool(kind)) & np.isfinite(frame["value"].to_numpy())
        if where.any():
            gid = panel.hover([texts[i] for i in np.flatnonzero(where)])
            rows = frame[where]
            panel.axes.plot(rows["layer"], rows["value"], linestyle="none", marker="o", gid=gid, **look)


def draw_floor(panel: Panel, shown: list[Curve]) -> None:
    """The rounding floor by layer, the region below it hatched as noise."""
    floors: dict[int, float] = {}
    for curve in shown:
        for layer, floor in zip(curve.layers, curve.floors, strict=True):
            if math.isfinite(floor):
                floors[layer] = max(floor, floors.get(layer, 0.0))
    if not floors:
        return
    layers = sorted(floors)
    heights = [floors[layer] for layer in layers]
    if len(layers) == 1:
        layers, heights = [layers[0] - 0.2, layers[0] + 0.2], heights * 2  # type: ignore[list-item]
    gid = panel.hover([f"Rounding floor, {number(min(heights))} to {number(max(heights))}: noise below"])
    bottom = panel.axes.get_ylim()[0]
    panel.axes.fill_between(layers, bottom, heights, facecolor="none", edgecolor=MUTED, hatch="////",
                            linewidth=0, gid=gid)  # fmt: skip
    panel.axes.plot(layers, heights, color=MUTED, linewidth=1.1, linestyle=(0, (3, 2)))
    panel.words.append(f"rounding floor {number(max(heights))}")


def svg_dashes(dashes: Dashes) -> str:
    """For a legend: matplotlib takes dashes in widths of the line."""
    return " ".join(f"{2 * length:g}" for length in dashes)


def keys_of(variants: list[str]) -> list[Key]:
    """The legend of the paper's variants."""
    keys = []
    for variant in variants:
        colour, dashes = STYLES[variant]
        keys.append(Key(variant, THEME[colour], svg_dashes(dashes)))
    return keys
