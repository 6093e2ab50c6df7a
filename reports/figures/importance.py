"""What each removal costs: a heat map of blocks and parts."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator

from rc_probe.results.findings.importance_words import UNITS, criterion, title_of
from rc_probe.results.words import signed

from .canvas import Panel, panel_of
from .heat import WIDE, draw_heat
from .panels import Figure
from .svg import HEAT

SHADES, LEAST = len(HEAT), 1e-2  # colours, and the share of the largest change at which the second one begins
ROW = {False: 30, True: 14}  # height of a part; of a head


def importance_figure(frame: pd.DataFrame) -> Figure | None:
    """Blocks to the right, parts downwards; frame: the table `importance`."""
    metric = criterion(frame)
    rows = frame[(frame["metric"] == metric) & frame["change"].notna()]
    if metric is None or rows.empty:
        return None
    rows = rows.assign(part=[_named(*one) for one in zip(rows["component"], rows["head"], strict=True)])
    parts = list(dict.fromkeys(rows["part"]))
    blocks = range(1, int(rows["block"].max()) + 1)
    cells = rows.set_index(["part", "block"])["change"]
    values = np.array([[cells.get((part, block), math.nan) for block in blocks] for part in parts])
    height = 110 + sum(ROW[part.startswith("head")] for part in parts)
    unit = UNITS.get(metric, "")
    with panel_of(
        "importance", f"Change of {title_of(metric).lower()} without the part", width=820, height=height
    ) as panel:
        _heat(panel, values, parts, unit)
    caption = (
        f"Each cell: one part removed, all else as it is. The more it stands out, the more it costs, on a log scale from {LEAST:g} of the "
        "largest change; the faintest colour is a change below that, or none, or an improvement."
    )
    return Figure("importance", "What each removal costs", caption, [], [panel.svg], wide=True)


def _named(component: str, head: float) -> str:
    return f"head {int(head)}" if math.isfinite(head) else component


def _heat(panel: Panel, values: np.ndarray, parts: Sequence[str], unit: str) -> None:
    axes, depth = panel.axes, values.shape[1]
    top = max(float(np.nanmax(values)), 1e-12)
    edges = np.array([0.0, *top * np.geomspace(LEAST, 1, SHADES)])
    texts = [
        f"{part}, block {block}: {signed(values[row, block - 1], 3)}{unit}"
        for row, part in enumerate(parts)
        for block in range(1, depth + 1)
    ]
    xs, ys = np.arange(depth + 1) + 0.5, np.arange(len(parts) + 1) - 0.5
    marks = (1, SHADES // 2 + 1, SHADES)
    draw_heat(panel, values, edges, HEAT, xs=xs, ys=ys, texts=texts, bar=WIDE, marks=marks)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    named = [i for i, part in enumerate(parts) if not part.startswith("head") or part.endswith(("1", "6"))]
    axes.yaxis.set_major_locator(FixedLocator(named))
    axes.yaxis.set_major_formatter(FixedFormatter([parts[i] for i in named]))
    axes.set_xlabel("block")
    for row, part in enumerate(parts):
        if np.isfinite(values[row]).any():
            most = int(np.nanargmax(values[row]))
            panel.words.append(f"{part} up to {signed(values[row, most], 3)}{unit} at block {most + 1}")
