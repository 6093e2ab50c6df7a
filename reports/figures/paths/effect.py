"""The figure of what paths of each length are worth: exact by scope, and the estimates from a few paths over it."""

import math
from collections.abc import Iterable, Mapping

import numpy as np

from rc_probe.reports.figures.canvas import Panel, panel_of
from rc_probe.reports.figures.panels import (
    Dashes,
    Figure,
    Key,
    Styles,
    by_layer,
    draw_line,
    draw_marks,
    set_scale,
    svg_dashes,
)
from rc_probe.reports.figures.svg import FG, MORE, MUTED, PANEL, SAN, SAN_MLP, SAN_SKIP, THEME, TRANSFORMER
from rc_probe.results.path_verdict import (
    ALL_BUT,
    ALONE,
    BASELINE,
    FULL,
    LENGTH,
    NONE,
    UP_TO,
    Series,
    draws,
    ends_of,
    level,
    quality,
    series,
    texts_of,
)
from rc_probe.results.protocols import Declaring
from rc_probe.results.words import number

TITLES = {"agreement": "Agreement with the whole model", "accuracy": "Accuracy"}
SCOPES = {ALONE: "length k alone", UP_TO: "all up to k", ALL_BUT: "all but k"}
LEVELS = {FULL: "whole model", BASELINE: "best constant answer", NONE: "biases alone, no path"}
_LINES: Styles = {
    SCOPES[ALONE]: (SAN, ()), SCOPES[UP_TO]: (TRANSFORMER, ()), SCOPES[ALL_BUT]: (SAN_SKIP, (5, 2.2)),
    LEVELS[FULL]: (FG, (7, 3)), LEVELS[BASELINE]: (MUTED, (1.2, 1.8)), LEVELS[NONE]: (MUTED, (6.5, 2, 1.2, 2)),
}  # fmt: skip
Lines = Mapping[tuple[str, float], tuple[str, Dashes]]  # name and height of a line across, and its style
# Colour, marker and the marker's path in a legend.
_MARKS = {
    "sampled": (SAN_MLP, "s", "M10.5 1.5h9v9h-9z"),
    "live": (FG, "^", "M15 1l5.5 10h-11z"),
}


SPREAD = "95 % interval of the mean"
_MORE: tuple[tuple[str, Dashes], ...] = (
    (MORE[0], (1.2, 1.8)),
    (MORE[1], (6.5, 2, 1.2, 2)),
    (MORE[2], (5, 2.2)),
)


def effect_figure(
    result: Declaring, *, guesses: Mapping[str, float] | None = None, spread: str = SPREAD
) -> Figure | None:
    """How well the model's head does with paths of each length: exact by scope, then exact under the estimates.

    guesses: further lines across the panels of accuracy, three at most; spread: what bands and bars are
    """
    best = quality(result)
    if best is None:
        return None
    shown = [metric for metric in ("agreement", best) if series(result, metric)]
    drawn = draws(result, best)
    small = len(set(shown)) + bool(drawn) > 2
    size = {"width": 330, "height": 250} if small else {}
    lines = dict(zip((guesses or {}).items(), _MORE, strict=False))
    panels = [
        _scopes_panel(result, metric, lines if metric == best else {}, **size)
        for metric in dict.fromkeys(shown)
    ]
    panels += [_draws_panel(result, best, drawn, lines, **size)] if drawn else []
    names = {name for metric in shown for name in _levels(result, metric)}
    keys = [_key(name) for name in _LINES if name in SCOPES.values() or name in names]
    keys += [Key(name, THEME[colour], svg_dashes(dashes)) for (name, _), (colour, dashes) in lines.items()]
    keys += [_mark_key(*one, hollow=_hollow(drawn, one)) for one in drawn]
    caption = (
        "What the model’s own head makes of a part of its paths, with attention, norms and activations as in the "
        f"whole model; biases are always there. Bands and bars: {spread}."
    )
    if drawn:
        caption += " Sampled paths are terms of the exact sum; live paths run alone, attention recomputed on their own states."
    return Figure("paths", "What paths of each length are worth", caption, keys, panels, small=small)


def _key(name: str) -> Key:
    colour, dashes = _LINES[name]
    return Key(name, THEME[colour], svg_dashes(dashes))


def _mark_key(estimator: str, n: int, *, hollow: bool) -> Key:
    colour, _, path = _MARKS[estimator]
    return Key(_named(estimator, n), THEME[colour], mark=path, hollow=hollow)


def _named(estimator: str, n: int) -> str:
    return f"{estimator}, {n} path{'' if n == 1 else 's'} of length k"


def _hollow(drawn: list[tuple[str, int]], one: tuple[str, int]) -> bool:
    """Fewer paths than the most of the same estimator."""
    return one[1] < max(n for estimator, n in drawn if estimator == one[0])


def _levels(result: Declaring, metric: str) -> dict[str, float]:
    """The reference lines; that the whole model agrees with itself needs none."""
    found = {name: level(result, metric, scope) for scope, name in LEVELS.items()}
    return {
        name: value
        for name, value in found.items()
        if value is not None and (metric != "agreement" or name != LEVELS[FULL])
    }


def _start(panel: Panel, result: Declaring, metric: str, every: Iterable[Series], lines: Lines) -> None:
    """Scales and reference lines of a panel of `metric`, which lies between 0 and 1."""
    shown = list(every)
    styles = dict(_LINES) | {name: style for (name, _), style in lines.items()}
    levels = _levels(result, metric) | dict(lines.keys())
    by_layer(panel.axes, max(one.lengths[-1] for one in shown), LENGTH)
    highs = [min(1.0, high) for one in shown for high in (*one.means, *one.highs) if math.isfinite(high)]
    set_scale(panel.axes, [*highs, *levels.values()], log=False, full=metric == "agreement")
    for name, value in levels.items():
        colour, dashes = styles[name]
        gid = panel.hover([f"{name[0].upper()}{name[1:]}: {number(value, 3)}"])
        panel.axes.axhline(value, color=colour, linewidth=1.3, linestyle=(0, dashes), gid=gid, zorder=1.5)
        panel.words.append(f"{name} {number(value, 3)}")


def _scopes_panel(result: Declaring, metric: str, lines: Lines, **size: float) -> str:
    found = {name: series(result, metric, scope) for scope, name in SCOPES.items()}
    shown = {name: one for name, one in found.items() if one}
    with panel_of(f"p{metric[:2]}", TITLES[metric], **size) as panel:
        _start(panel, result, metric, shown.values(), lines)
        for name, one in shown.items():
            _line(panel, name, one)
    return panel.svg


def _line(panel: Panel, name: str, one: Series, *, marks: bool = True) -> None:
    """An exact series: a line with its band, and a mark for each length."""
    colour = _LINES[name][0]
    if any(map(math.isfinite, one.highs)):
        panel.axes.fill_between(one.lengths, np.clip(one.lows, 0, 1), np.clip(one.highs, 0, 1), color=colour,
                                alpha=0.14, linewidth=0)  # fmt: skip
    draw_line(panel.axes, one.lengths, one.means, _LINES[name], linewidth=2)
    if marks:
        draw_marks(
            panel, one.lengths, one.means, colour, texts_of(name, one), hollow=[False] * len(one.means)
        )
    panel.words.append(ends_of(name, one))


def _draws_panel(
    result: Declaring, metric: str, drawn: list[tuple[str, int]], lines: Lines, **size: float
) -> str:
    """The estimates from a few paths, beside each other over the exact line."""
    exact = series(result, metric)
    found = {one: series(result, metric, estimator=one[0], drawn=one[1]) for one in drawn}
    shown = {one: values for one, values in found.items() if values}
    with panel_of("pdrawn", f"{TITLES[metric]}, length k alone", **size) as panel:
        _start(panel, result, metric, filter(None, [exact, *shown.values()]), lines)
        if exact:
            _line(panel, SCOPES[ALONE], exact, marks=False)
        shifts = np.linspace(-0.27, 0.27, len(shown)) if len(shown) > 1 else [0.0]
        for shift, (one, values) in zip(shifts, shown.items(), strict=True):
            _points(panel, one, values, float(shift), hollow=_hollow(drawn, one))
        first, last = panel.axes.get_xlim()
        panel.axes.set_xlim(first - 0.2, last + 0.2)
    return panel.svg


def _points(panel: Panel, one: tuple[str, int], values: Series, shift: float, *, hollow: bool) -> None:
    colour, marker, _ = _MARKS[one[0]]
    x = np.array(values.lengths) + shift
    panel.axes.vlines(x, np.clip(values.lows, 0, 1), np.clip(values.highs, 0, 1), color=colour, linewidth=1.1)
    gid = panel.hover(texts_of(_named(*one), values))
    panel.axes.plot(x, values.means, linestyle="none", marker=marker, ms=5.2 if len(x) < 16 else 4,
                    mfc=PANEL if hollow else colour, mec=colour, mew=1.2, gid=gid, clip_on=False)  # fmt: skip
    panel.words.append(ends_of(_named(*one), values))
