"""A heat map: its cells, and a bar of all colours beside them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap

from rc_probe.results.words import number

from .canvas import Panel
from .svg import MUTED

NARROW, WIDE = (
    (0.03, 0.04),
    (0.015, 0.02),
)  # the bar of a panel beside others, and of one over the whole width


def draw_heat(
    panel: Panel,
    values: np.ndarray,
    edges: Sequence[float] | np.ndarray,
    colours: Sequence[str],
    *,
    xs: np.ndarray,
    ys: np.ndarray,
    texts: Sequence[str] = (),
    bar: tuple[float, float] = NARROW,
    marks: Sequence[int] | None = None,
    upwards: bool = False,
    label: Callable[[float], str] = number,
) -> None:
    """values: (rows, columns), in `colours` as they lie between `edges`, one more than colours; what is not finite stays empty.

    xs, ys: where columns and rows begin and end; texts: to hover on, row by row; bar: how far from the cells and how wide, as shares
    of their width; marks: which edges are labelled (default: the first, the middle one, the last); upwards: the first row is the lowest
    """
    axes, edges = panel.axes, np.asarray(edges, dtype=float)
    style: dict[str, Any] = {
        "cmap": ListedColormap(list(colours)),
        "norm": BoundaryNorm(edges, len(colours), clip=True),
        "linewidth": 0,
    }
    hover: dict[str, Any] = {"gid": panel.hover(list(texts))} if len(texts) else {}
    axes.pcolormesh(xs, ys, np.ma.masked_invalid(values), **hover, **style)
    gap, wide = (share * (xs[-1] - xs[0]) for share in bar)
    start = xs[-1] + gap
    bottom, top = (ys[0], ys[-1]) if upwards else (ys[-1], ys[0])
    heights = np.linspace(bottom, top, len(edges))
    axes.pcolormesh([start, start + wide], heights, ((edges[:-1] + edges[1:]) / 2)[:, None], **style)
    for at in (0, len(colours) // 2, len(colours)) if marks is None else marks:
        axes.text(start + 1.3 * wide, heights[at], label(float(edges[at])), va="center", color=MUTED)
    axes.set_xlim(xs[0], start + wide)
    axes.set_ylim(bottom, top)
    panel.grid = ""
