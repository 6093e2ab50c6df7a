"""What figures share: legends, scales, curves with bands and marks, the rounding floor."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from rc_probe.registry import PAPER
from rc_probe.results.curves import Curve
from rc_probe.results.words import number, power_of_ten

from .canvas import Panel
from .svg import MUTED, PANEL, SAN, SAN_MLP, SAN_SKIP, THEME, TRANSFORMER

Dashes = tuple[float, ...]
Styles = Mapping[str, tuple[str, Dashes]]  # colour and dashes of each curve by its name
# The paper's line styles: SAN dotted, SAN+MLP dashed, SAN+skip dash-dot, transformer solid.
_LOOKS: tuple[tuple[str, Dashes], ...] = (
    (SAN, (1.2, 1.8)), (SAN_MLP, (5, 2.2)), (SAN_SKIP, (6.5, 2, 1.2, 2)), (TRANSFORMER, ()),
)  # fmt: skip
STYLES: Styles = dict(zip(PAPER, _LOOKS, strict=True))


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
    width: float = 2.4  # of the line


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


def by_layer(axes: Axes, last: int, label: str = "layer", first: int = 0) -> None:
    """Layers (or what `label` says) `first` to `last` along x."""
    axes.set_xlabel(label)
    axes.set_xlim(first - 0.25, last + 0.25)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))


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


def draw_line(
    axes: Axes, xs: Sequence[float], values: Sequence[float], style: tuple[str, Dashes], **options: Any
) -> None:
    """A line in its colour and dashes, on over what is not finite. options: of matplotlib's `plot`."""
    known = np.isfinite(np.asarray(values, dtype=float))
    colour, dashes = style
    axes.plot(np.asarray(xs)[known], np.asarray(values)[known], color=colour, linestyle=(0, dashes) if dashes else "-", **options)  # fmt: skip


def draw(
    panel: Panel, shown: Mapping[str, Curve], styles: Styles = STYLES, *, band: bool = True, width: float = 2,
    size: float = 4.6,
) -> None:  # fmt: skip
    """Curves by name with bands of ± 1 std and a mark per layer of this size, hollow where it is rounding noise."""
    if not shown:
        return
    axes = panel.axes
    bottom = lowest(axes)
    for name, curve in shown.items() if band else ():
        if np.isfinite(curve.stds).any():
            low, high = (np.add(curve.means, sign * np.array(curve.stds)) for sign in (-1, 1))
            axes.fill_between(curve.layers, np.maximum(low, bottom), high, color=styles[name][0], alpha=0.16,
                              linewidth=0)  # fmt: skip
    for name, curve in shown.items():
        draw_line(axes, curve.layers, np.maximum(curve.means, bottom).tolist(), styles[name], linewidth=width)
    for name, curve in shown.items():
        noise = [curve.at_floor(i) for i in range(len(curve.layers))]
        texts = [_hover(name, curve, i) for i in range(len(curve.layers))]
        draw_marks(panel, curve.layers, curve.means, styles[name][0], texts, hollow=noise, size=size)
        panel.words.append(ends(name, curve))


def lowest(axes: Axes) -> float:
    """The lower edge of a log scale, where an exact zero is drawn, as half precision gives."""
    return axes.get_ylim()[0] if axes.get_yscale() == "log" else -math.inf


def draw_marks(
    panel: Panel, xs: Sequence[float], values: Sequence[float], colour: str, texts: list[str], *,
    hollow: Sequence[bool], size: float = 4.6,
) -> None:  # fmt: skip
    """A mark for each value with its text to hover on."""
    heights = np.maximum(np.asarray(values, dtype=float), lowest(panel.axes))
    looks: tuple[dict[str, Any], ...] = (
        {"mfc": colour, "mec": (0, 0, 0, 0), "mew": 7, "ms": size},  # a wide clear edge to hover on
        {"mfc": PANEL, "mec": colour, "mew": 1.1, "ms": size + 0.2},
    )
    for kind, look in enumerate(looks):
        where = (np.array(hollow, dtype=bool) == bool(kind)) & np.isfinite(heights)
        if where.any():
            gid = panel.hover([texts[i] for i in np.flatnonzero(where)])
            panel.axes.plot(
                np.asarray(xs)[where], heights[where], linestyle="none", marker="o", gid=gid, **look
            )


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


def spelt(variants: Iterable[str]) -> str:
    """A sentence, after a space, that says what SAN is; nothing where only the whole model is shown."""
    if not set(PAPER[:-1]) & set(variants):
        return ""
    return " SAN (self-attention network) is attention without its skips and without MLPs; SAN+skip and SAN+MLP keep one of the two."


def keys_of(variants: list[str]) -> list[Key]:
    """The legend of the paper's variants."""
    keys = []
    for variant in variants:
        colour, dashes = STYLES[variant]
        keys.append(Key(variant, THEME[colour], svg_dashes(dashes)))
    return keys
