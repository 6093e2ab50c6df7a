"""The figure of lengths: how many paths each has, and how little of the norm the many carry."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from rc_probe.reports.figures.canvas import Panel, panel_of
from rc_probe.reports.figures.panels import Figure, Key, by_layer, set_scale
from rc_probe.reports.figures.svg import ACCENT, BASE_SIZE, FG, MUTED, THEME, TRANSFORMER
from rc_probe.results.path_verdict import LENGTH, Series, distribution, laws, percent, series, short
from rc_probe.results.protocols import Result
from rc_probe.results.words import name_of, number

_OF_PATHS, _OF_NORM = "share of all paths", "share of the norm"
_SOLID = "M9 0h12v12h-12z"
MOST_NAMED = 4  # architectures beside the model at hand
KNOWN = ("DistilBERT", "BERT-base", "BERT-large", "GPT-3", "Llama-2-7B", "DeiT-T")


def lengths_figure(result: Result) -> Figure | None:
    """How many paths each length has against how much of the norm it carries; other architectures beside it."""
    counts, norm = distribution(result), series(result, "norm_share")
    if counts.empty and norm is None:
        return None
    keys = [] if counts.empty else [Key(_OF_PATHS, THEME[MUTED], mark=_SOLID)]
    keys += [Key(_OF_NORM, THEME[TRANSFORMER], mark=_SOLID)] if norm else []
    panels = [_bars_panel(counts, norm)]
    caption = "Bars: this model, with the number of paths of each length above them. " if len(counts) else ""
    caption += (
        "The norm is that of what a length adds to the last hidden state, as a share of the norms of all parts."
        if norm
        else ""
    )
    if len(counts):
        panels.append(_architectures_panel(result))
        keys += [Key(name_of(result), THEME[ACCENT]), Key("other architectures", THEME[MUTED])]
    return Figure("lengths", "What paths of each length carry", caption.strip(), keys, panels)


def biases_of(norm: Series) -> float:
    """What the lengths leave of the norm: the shares of all parts add up to one."""
    return max(0.0, 1 - sum(norm.means))


def _bars_panel(counts: pd.DataFrame, norm: Series | None) -> str:
    shares = dict(zip(counts["length"].astype(int), counts["share"].astype(float), strict=True))
    carried = dict(zip(norm.lengths, norm.means, strict=True)) if norm else {}
    last = max([*shares, *carried])
    title = "Paths and norm by length" if shares and carried else "Share by length"
    with panel_of("pbars", title, height=310) as panel:
        axes = panel.axes
        by_layer(axes, last, LENGTH)
        heights = [*shares.values(), *carried.values()]
        biases = [biases_of(norm)] if norm else []
        set_scale(axes, [1.32 * max([*heights, *biases])], log=False)  # room for the counts above
        for values, colour, shift, name in (
            (shares, MUTED, -0.2, _OF_PATHS),
            (carried, TRANSFORMER, 0.2, _OF_NORM),
        ):
            for length, value in values.items():
                _bar(
                    panel,
                    length + shift * bool(shares and carried),
                    value,
                    colour,
                    f"Length {length}, {name}: {number(value, 3)}",
                )
        for value in biases:
            _bar(panel, last + 1.6, value, TRANSFORMER, f"Biases, share of the norm: {number(value, 3)}")
        _counts_above(axes, counts, shares, carried)
        ticks = [int(t) for t in MaxNLocator(7, integer=True).tick_values(0, last) if 0 <= t <= last]
        places, names = (
            [*map(float, ticks), *[last + 1.6 for _ in biases]],
            [*map(str, ticks), *["biases" for _ in biases]],
        )
        axes.set_xlim(-0.7, last + (2.3 if biases else 0.7))
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_major_formatter(FixedFormatter(names))
    return panel.svg


def _bar(panel: Panel, x: float, height: float, colour: str, text: str) -> None:
    (bar,) = panel.axes.bar(x, height, width=0.4, color=colour, linewidth=0)
    bar.set_gid(panel.hover([text]))
    panel.words.append(text)


def _counts_above(
    axes: Axes, counts: pd.DataFrame, shares: dict[int, float], carried: dict[int, float]
) -> None:
    """The number of paths of each length, upright where there is no room for all beside each other."""
    step = math.ceil(len(counts) / 16)
    room = axes.get_ylim()[1] * 0.02
    for length, count in zip(counts["length"].astype(int), counts["count"], strict=True):
        if length % step == 0:
            top = max(shares.get(length, 0.0), carried.get(length, 0.0))
            axes.text(length, top + room, short(count), rotation=90 if len(counts) > 4 else 0, ha="center", va="bottom",
                      fontsize=float(BASE_SIZE), color=FG)  # fmt: skip


def _architectures_panel(result: Result) -> str:
    """The law of the length of a random path, as in the paper on a logarithmic axis."""
    found = laws(result)
    mine = next(iter(found))
    with panel_of("pcounts", "Share of all paths by length") as panel:
        axes = panel.axes
        placed: list[tuple[float, float]] = []
        for name in [mine, *(known for known in KNOWN if known in found and known != mine)]:
            x, y = found[name]["length"].to_numpy(), found[name]["share"].to_numpy()
            top = int(y.argmax())
            near = any(abs(math.log2(max(x[top], 1) / p)) < 0.8 and abs(y[top] - q) < 0.2 for p, q in placed)
            if near or len(placed) > MOST_NAMED:
                continue
            placed.append((max(float(x[top]), 1.0), float(y[top])))
            _law(panel, name if name != mine else "this model", x, y, mine=name == mine)
        longest = round(axes.dataLim.x1)
        axes.set_xscale("log", base=2)
        axes.set_xlim(0.93, longest * 1.35)
        ticks = [2**i for i in range(longest.bit_length())]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FixedFormatter([str(tick) for tick in ticks]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("path length, log scale")
        set_scale(axes, [1.12 * y for _, y in placed], log=False)
    return panel.svg


def _law(panel: Panel, name: str, x: np.ndarray, y: np.ndarray, *, mine: bool) -> None:
    top = int(y.argmax())
    mean = float((x * y).sum())
    text = f"{name}: {len(x) - 1} hops, mean length {number(mean, 3)}, most at {x[top]} ({percent(float(y[top]))})"
    colour = ACCENT if mine else MUTED
    seen = x > 0
    panel.axes.plot(x[seen], y[seen], color=colour, linewidth=2.4 if mine else 1.4, gid=panel.hover([text]), zorder=3 if mine else 2)  # fmt: skip
    panel.axes.annotate(name, (max(float(x[top]), 1.0), float(y[top])), xytext=(0, 6), textcoords="offset points",
                        ha="center", va="bottom", color=colour if mine else FG, fontsize=float(BASE_SIZE),
                        fontweight="bold" if mine else "normal")  # fmt: skip
    panel.words.append(text)
