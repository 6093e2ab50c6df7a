"""Embeddings: the cosines of random pairs, and by layer how alike they are, what they find, how many directions they use."""

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.ticker import MaxNLocator

from rc_probe.results.curves import Curve
from rc_probe.results.findings.embedding_words import by_layer as values_of
from rc_probe.results.findings.embedding_words import own, quality, title_of
from rc_probe.results.words import number

from .canvas import panel_of
from .panels import Figure, Key, Styles, by_layer, draw, set_scale, svg_dashes
from .svg import ACCENT, MUTED, SAN_SKIP, THEME, TRANSFORMER

DIRECTIONS: Styles = {"isoscore": (TRANSFORMER, ()), "first_component": (SAN_SKIP, (5, 2.2))}
FLOOR = (3, 2)  # dashes of a line that something is read against


def embeddings_figure(frame: pd.DataFrame, cosines: pd.DataFrame) -> Figure | None:
    """frame, cosines: the tables `embeddings` and `embedding_cosines`."""
    if frame.empty:
        return None
    last, metric = int(frame["layer"].max()), quality(frame)
    panels = [_pairs_panel(cosines, own(frame))] if len(cosines) else []
    if "embedding_cosine" in set(frame["metric"]):
        panels.append(_cosine_panel(frame, last))
    panels += [_quality_panel(frame, metric, last)] if metric else []
    there = [name for name in DIRECTIONS if name in set(frame["metric"])]
    most = max(values_of(frame, "isoscore", "most").values(), default=math.nan)
    panels += [_directions_panel(frame, there, last, most)] if there else []
    keys = [Key("mean of random pairs", THEME[ACCENT])] if len(cosines) else []
    keys += [
        Key(title_of(name), THEME[DIRECTIONS[name][0]], svg_dashes(DIRECTIONS[name][1])) for name in there
    ]
    if math.isfinite(most):
        keys.append(
            Key("IsoScore that so many samples can reach", THEME[MUTED], svg_dashes(FLOOR), width=1.2)
        )
    caption = (
        "The last layer is the model’s own embedding, behind its final norm. Bands: one standard deviation of the pairs; of "
        "retrieval the 95 % interval."
    )
    return Figure("embeddings", "Embeddings of whole samples", caption, keys, panels)


def _pairs_panel(cosines: pd.DataFrame, found: dict[str, dict[str, float]]) -> str:
    """The histogram of the model's own embeddings."""
    with panel_of("epairs", "Random pairs by their cosine") as panel:
        axes = panel.axes
        bins = [(float(low), float(high), int(pairs)) for low, high, pairs in cosines.itertuples(index=False)]
        shown = [each for each in bins if each[2]]
        texts = [f"{number(low)} to {number(high)}: {pairs:,} pairs" for low, high, pairs in shown]
        corners = [[(low, 0), (low, pairs), (high, pairs), (high, 0)] for low, high, pairs in shown]
        axes.add_collection(
            PolyCollection(corners, facecolor=TRANSFORMER, linewidth=0, gid=panel.hover(texts))
        )
        axes.set_xlim(bins[0][0] - 0.02, bins[-1][1] + 0.02)
        set_scale(axes, [float(pairs) for _, _, pairs in bins], log=False)
        mean = float(found["embedding_cosine"]["value"])
        axes.axvline(mean, color=ACCENT, linewidth=2)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.set_xlabel("cosine")
        far = float(found["embedding_cosine_far"]["value"])
        panel.words += [f"mean {number(mean)}", f"95 % of the pairs below {number(far)}"]
    return panel.svg


def _cosine_panel(frame: pd.DataFrame, last: int) -> str:
    with panel_of("ecosine", "Cosine of random pairs by layer") as panel:
        curve = _curve(frame, "embedding_cosine", values_of(frame, "embedding_cosine", "std"))
        by_layer(panel.axes, last)
        ends = [
            mean + sign * std for mean, std in zip(curve.means, curve.stds, strict=True) for sign in (-1, 1)
        ]
        set_scale(panel.axes, [*curve.means, *filter(math.isfinite, ends)], log=False)
        draw(panel, {"cosine": curve}, {"cosine": (ACCENT, ())})
    return panel.svg


def _quality_panel(frame: pd.DataFrame, metric: str, last: int) -> str:
    with panel_of("equality", f"{title_of(metric)} by layer") as panel:
        low, high = (values_of(frame, metric, end) for end in ("low", "high"))
        curve = _curve(frame, metric)
        by_layer(panel.axes, last)
        set_scale(panel.axes, [*curve.means, *low.values(), *high.values()], log=False, full=True)
        _band(panel.axes, low, high)
        draw(panel, {metric: curve}, {metric: (TRANSFORMER, ())}, band=False)
    return panel.svg


def _band(axes: Axes, low: dict[int, float], high: dict[int, float]) -> None:
    known = [layer for layer in low if math.isfinite(low[layer]) and math.isfinite(high[layer])]
    lower, upper = ([end[layer] for layer in known] for end in (low, high))
    axes.fill_between(known, lower, upper, color=TRANSFORMER, alpha=0.16, linewidth=0)


def _directions_panel(frame: pd.DataFrame, names: list[str], last: int, most: float) -> str:
    with panel_of("edirections", "Directions in use by layer") as panel:
        curves = {name: _curve(frame, name) for name in names}
        by_layer(panel.axes, last)
        set_scale(panel.axes, [most, *(mean for curve in curves.values() for mean in curve.means)], log=False)
        if math.isfinite(most):
            panel.axes.axhline(most, color=MUTED, linewidth=1.1, linestyle=(0, FLOOR))
            panel.words.append(f"so many samples reach an IsoScore of at most {number(most)}")
        draw(panel, curves, DIRECTIONS, band=False)
    return panel.svg


def _curve(frame: pd.DataFrame, metric: str, stds: dict[int, float] | None = None) -> Curve:
    found = values_of(frame, metric)
    nothing = [math.nan] * len(found)
    return Curve([*found], [*found.values()], [*(stds or {}).values()] or nothing, nothing)
