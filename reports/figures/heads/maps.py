"""Heat maps of heads: blocks to the right, heads downwards."""

import math

import numpy as np
import pandas as pd
from matplotlib.axis import Axis

from rc_probe.registry import HEAD_METRICS
from rc_probe.reports.figures.canvas import Panel, panel_of
from rc_probe.reports.figures.heat import draw_heat
from rc_probe.reports.figures.panels import Figure
from rc_probe.reports.figures.svg import HEAT
from rc_probe.results.findings.heads.rank_words import by_head
from rc_probe.results.words import number

SHADES = len(HEAT)
MAPS = (  # circuit, metric, what the panel is called
    ("qk", "effective_rank", "Query-key: effective rank"),
    ("qk", "logits_r90", "Scores on the data: rank of 90 %"),
    ("qk", "identity", "Query-key: nearness to ±I"),
    ("ov", "effective_rank", "Output-value: effective rank"),
)
CAPTION = (
    "Each cell is a head. Ranks: the more it stands out, the higher, from 0 to the width of a head. Nearness to ±I: above 0 the head looks for tokens "
    "like its own (nearest-like), below 0 for unlike ones (farthest-like)."
)


def head_maps(frame: pd.DataFrame, width: int) -> Figure | None:
    """frame: the table `heads`; width: of a head."""
    panels = []
    for circuit, metric, title in MAPS:
        values = by_head(frame, circuit, metric)
        if values.empty:
            continue
        grid = values.unstack("block").sort_index()
        height = 100 + min(14 * len(grid), 240)
        with panel_of(f"heads-{circuit}-{metric}", title, height=height) as panel:
            low, high = (-1.0, 1.0) if metric == "identity" else (0.0, float(width))
            draw_map(panel, grid, HEAD_METRICS[metric].title, low, high)
        panels.append(panel.svg)
    return Figure("heads", "The ranks of heads", CAPTION, [], panels) if panels else None


def draw_map(panel: Panel, grid: pd.DataFrame, title: str, low: float, high: float) -> None:
    import seaborn as sns

    axes, values = panel.axes, grid.to_numpy(dtype=float)
    heads, blocks = [int(n) for n in grid.index], [int(n) for n in grid.columns]
    texts = [
        f"head {head}, block {block}: {number(values[row, column], 3)}"
        for row, head in enumerate(heads) for column, block in enumerate(blocks)
    ]  # fmt: skip
    colours = sns.color_palette("vlag_r", SHADES).as_hex() if low < 0 else HEAT
    xs, ys = np.arange(len(blocks) + 1) + 0.5, np.arange(len(heads) + 1) + 0.5
    draw_heat(panel, values, np.linspace(low, high, SHADES + 1), colours, xs=xs, ys=ys, texts=texts)
    _number_cells(axes.xaxis, blocks)
    _number_cells(axes.yaxis, heads)
    axes.set_xlabel("block")
    axes.set_ylabel("head")
    known = values[np.isfinite(values)]
    if known.size:
        panel.words.append(f"{title} {number(float(known.min()))} to {number(float(known.max()))}")


def _number_cells(axis: Axis, numbers: list[int]) -> None:
    """Label the cells, which lie at 1, 2, …, by their own numbers: round ones where all are there, else every few."""
    step = math.ceil(len(numbers) / 7)
    whole = numbers == [*range(1, len(numbers) + 1)]
    shown = range(step if whole else 1, len(numbers) + 1, step)
    axis.set_ticks([*shown], [str(numbers[place - 1]) for place in shown])


def pair_figure(frame: pd.DataFrame) -> Figure | None:
    """The energy of pairs of rotary features, fastest first: a row for each block."""
    rows = frame[frame["metric"].str.startswith("pair_") & frame["head"].isna()]
    if rows.empty:
        return None
    rows = rows.assign(pair=rows["metric"].str.removeprefix("pair_").astype(int))
    grid = rows.pivot_table(index="pair", columns="block", values="value").sort_index()
    top = float(grid.to_numpy(dtype=float).max())
    if not math.isfinite(top):
        return None
    with panel_of(
        "heads-pairs",
        "Energy of the query-key form by rotary pair",
        width=820,
        height=100 + min(10 * len(grid), 260),
    ) as panel:
        draw_map(panel, grid, "Energy", 0.0, top)
        panel.axes.set_ylabel("pair")
    caption = "Pair 1 turns fastest with the position. Energy in slow pairs sees content alone; energy in fast ones sees how far tokens are apart."
    return Figure("heads-pairs", "Which rotary features heads use", caption, [], [panel.svg], wide=True)
