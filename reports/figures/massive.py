"""Massive tokens: how much longer they are than the others, and how many there are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pandas as pd

from rc_probe.registry import MASSIVE, WHOLE
from rc_probe.results.curves import Curve, Curves
from rc_probe.results.words import WEIGHTS, number

from .canvas import panel_of
from .panels import Figure, Key, Styles, by_layer, draw, draw_line, draw_marks, set_scale, svg_dashes
from .svg import MUTED, SAN, SAN_MLP, SAN_SKIP, THEME, TRANSFORMER

Groups = Sequence[tuple[str, pd.DataFrame]]  # phrase and rows of the table `massive`
LOOKS = ((TRANSFORMER, ()), (SAN, (5, 2.2)), (SAN_SKIP, (1.2, 1.8)), (SAN_MLP, (6.5, 2, 1.2, 2)))
FRESH: tuple[str, tuple[float, ...]] = (MUTED, (5, 2.2))


def massive_figure(groups: Groups, share: Curves, last: int) -> Figure | None:
    """Norms of the first groups of tokens by layer, and the share of massive tokens of the whole model."""
    if not groups:
        return None
    shown = dict(groups[: len(LOOKS)])
    styles = dict(zip(shown, LOOKS, strict=False))
    panels = [_norms_panel(shown, styles, last)]
    keys = [Key(name, THEME[colour], svg_dashes(dashes)) for name, (colour, dashes) in styles.items()]
    keys.append(Key(f"{MASSIVE} times the median norm", THEME[MUTED], svg_dashes((3, 2)), width=1.2))
    shares = {
        WEIGHTS[weights]: replace(curve, floors=[math.nan] * len(curve.floors))  # no share is noise
        for (weights, variant), curve in share.items()
        if variant == WHOLE and any(curve.means)
    }
    if shares:
        panels.append(_share_panel(shares, last))
    if WEIGHTS["init"] in shares:
        keys.append(Key("freshly initialised (share)", THEME[FRESH[0]], svg_dashes(FRESH[1])))
    rest = len(groups) - len(shown)
    caption = "Norms are means over the samples in which the token is massive, pretrained weights."
    caption += f" {rest} more groups of tokens are in the table." if rest else ""
    return Figure("massive", "Massive tokens by layer", caption, keys, panels)


def by_layer_of(rows: pd.DataFrame) -> dict[int, float]:
    """The mean of `norm_over_median` over the samples of each layer."""
    weighted = rows.assign(total=rows["norm_over_median"] * rows["samples"]).groupby("layer")
    return {int(str(layer)): float(part["total"].sum() / part["samples"].sum()) for layer, part in weighted}


def _norms_panel(shown: Mapping[str, pd.DataFrame], styles: Styles, last: int) -> str:
    with panel_of("mnorm", "Times the median norm, log scale") as panel:
        found = {name: by_layer_of(rows) for name, rows in shown.items()}
        by_layer(panel.axes, last)
        values = [value for one in found.values() for value in one.values()]
        set_scale(panel.axes, [MASSIVE, *values], log=True)
        panel.axes.set_ylim(1, panel.axes.get_ylim()[1])
        panel.axes.axhline(MASSIVE, color=MUTED, linewidth=1.1, linestyle=(0, (3, 2)))
        for name, one in found.items():
            layers = list(range(last + 1))
            known = [one.get(layer, math.nan) for layer in layers]
            for start, stop in _runs(known):
                draw_line(panel.axes, layers[start:stop], known[start:stop], styles[name], linewidth=2)
            texts = [
                f"{name}, layer {layer}: {number(value, 3)} times the median" for layer, value in one.items()
            ]
            draw_marks(
                panel, list(one), list(one.values()), styles[name][0], texts, hollow=[False] * len(one)
            )
            top = max(one, key=lambda layer: one[layer])
            panel.words.append(f"{name} up to {number(one[top], 3)} times the median, at layer {top}")
    return panel.svg


def _runs(values: Sequence[float]) -> list[tuple[int, int]]:
    """Where finite values stand next to each other, as (start, stop)."""
    edges = [0, *(i + 1 for i, value in enumerate(values) if math.isnan(value)), len(values) + 1]
    return [(start, stop - 1) for start, stop in pairwise(edges) if stop - 1 > start]


def _share_panel(shares: Mapping[str, Curve], last: int) -> str:
    looks = {name: FRESH if name == WEIGHTS["init"] else LOOKS[0] for name in shares}
    with panel_of("mshare", "Share of massive tokens") as panel:
        by_layer(panel.axes, last)
        set_scale(panel.axes, [value for curve in shares.values() for value in curve.means], log=False)
        draw(panel, shares, looks, band=False, width=1.7)
    return panel.svg
