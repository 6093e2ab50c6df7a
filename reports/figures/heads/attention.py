"""The model's own attention: heat maps of blocks and heads, and what the product of the patterns keeps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from rc_probe.reports.figures.canvas import Panel, panel_of
from rc_probe.reports.figures.heat import draw_heat
from rc_probe.reports.figures.panels import Figure, Key, Styles, draw_line, draw_marks, set_scale, svg_dashes
from rc_probe.reports.figures.svg import HEAT, SAN, SAN_MLP, SAN_SKIP, THEME, TRANSFORMER
from rc_probe.results.findings.attention_words import heads_of
from rc_probe.results.words import number

SHADES = len(HEAT)
MOST_HOVER = 1500  # cells with a text to hover on; a page of a large model stays small


@dataclass(frozen=True)
class _Map:
    """A heat map: its title, the edges between its colours, and what these are."""

    metric: str
    title: str
    edges: Sequence[float]
    palette: str | None = None  # None: what is high stands out from the page


RATIO = tuple(np.linspace(0, 1, SHADES + 1))
MAPS = (
    _Map("sink", "Mean attention to one key", RATIO),
    _Map("entropy", "Entropy, 1: even", RATIO),
    _Map("dobrushin", "Dobrushin coefficient", RATIO),
    _Map("phase", "Variance of scores, β / β_c", tuple(2.0 ** np.linspace(-2.5, 2.5, SHADES + 1)), "vlag"),
)
CROSS = MAPS[:2]
_LINES: Styles = {
    "product": (TRANSFORMER, ()), "averaged": (SAN_SKIP, (6.5, 2, 1.2, 2)), "paths": (SAN_MLP, (5, 2.2)),
    "bound": (SAN, (1.2, 1.8)),
}  # fmt: skip
_NAMES = {
    "product": "product of all patterns to here", "averaged": "pattern of the block", "paths": "any path, at most",
    "bound": "theorem, at most",
}  # fmt: skip


def heads_figures(frame: pd.DataFrame) -> list[Figure]:
    """Blocks to the right, heads downwards; frame: the table `attention`."""
    both = (("attention", "Attention, head by head", MAPS), ("cross", "Cross-attention, head by head", CROSS))
    return [made for component, title, maps in both if (made := _heads(frame, component, title, maps))]


def _heads(frame: pd.DataFrame, component: str, title: str, maps: Sequence[_Map]) -> Figure | None:
    panels = []
    for one in maps:
        rows = heads_of(frame, one.metric, component)
        if rows.empty:
            continue
        cells = rows.pivot_table(index="head", columns="block", values="mean")
        heads, blocks = range(1, int(rows["head"].max()) + 1), range(1, int(rows["block"].max()) + 1)
        values = cells.reindex(index=heads, columns=blocks).to_numpy(float)
        with panel_of(f"{component}-{one.metric}", one.title) as panel:
            _heat(panel, one, values)
        panels.append(panel.svg)
    caption = (
        "Each cell: one head of one block, mean over the samples that were read. A Dobrushin coefficient of 1: two queries see "
        "nothing in common. β / β_c over 1: a few keys hold what a query sees (entropy collapse), below 1 many do (rank collapse)."
    )
    return Figure(f"{component}-heads", title, caption, [], panels) if panels else None


def _heat(panel: Panel, one: _Map, values: np.ndarray) -> None:
    import seaborn as sns

    axes, (heads, blocks) = panel.axes, values.shape
    colours = HEAT if one.palette is None else sns.color_palette(one.palette, SHADES).as_hex()
    texts = [
        f"block {block}, head {head}: {number(values[head - 1, block - 1])}"
        for head in range(1, heads + 1)
        for block in range(1, blocks + 1)
    ]
    xs, ys = np.arange(blocks + 1) + 0.5, np.arange(heads + 1) + 0.5
    draw_heat(
        panel, values, one.edges, colours, xs=xs, ys=ys, texts=texts if values.size <= MOST_HOVER else ()
    )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.set_xlabel("block")
    axes.set_ylabel("head")
    head, block = np.unravel_index(int(np.nanargmax(values)), values.shape)
    low, high = number(float(np.nanmin(values))), number(float(np.nanmax(values)))
    panel.words.append(f"{low} to {high}, largest in block {block + 1}, head {head + 1}")


def products_figure(frame: pd.DataFrame) -> Figure | None:
    """How much of what tells tokens apart the patterns keep, block by block; frame: the table `attention_masks`."""
    frame = frame[frame["product"].notna()]
    if len(frame) < 2:
        return None
    blocks = [int(block) for block in frame["block"]]
    with panel_of("attention-products", "Dobrushin coefficient, log scale", width=820) as panel:
        panel.axes.set_xlabel("block")
        panel.axes.set_xlim(blocks[0] - 0.25, blocks[-1] + 0.25)
        panel.axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
        set_scale(panel.axes, frame[list(_LINES)].to_numpy(float).ravel().tolist(), log=True)
        for name, style in reversed(list(_LINES.items())):
            values = frame[name].astype(float).tolist()
            draw_line(panel.axes, blocks, values, style, linewidth=2)
            texts = [
                f"{_NAMES[name]}, block {b}: {number(v, 3)}" for b, v in zip(blocks, values, strict=True)
            ]
            draw_marks(panel, blocks, values, style[0], texts, hollow=[False] * len(blocks), size=3.6)
            panel.words.append(f"{_NAMES[name]} {number(values[-1])} at block {blocks[-1]}")
    keys = [Key(_NAMES[name], THEME[colour], svg_dashes(dashes)) for name, (colour, dashes) in _LINES.items()]
    caption = (
        "Patterns averaged over the heads, multiplied from block 1 on: no two tokens get mixtures of the input that differ "
        "by more, if attention is all that there is. Skips and MLPs are not in it."
    )
    return Figure("attention-products", "What the patterns keep", caption, keys, [panel.svg], wide=True)
