"""A map of two interventions: the residual as colour, the loss as lines; and its row and column of the model itself."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.ticker import FixedFormatter, FixedLocator

from rc_probe.reports.figures.canvas import Panel, panel_of
from rc_probe.reports.figures.heat import draw_heat
from rc_probe.reports.figures.panels import Figure, Key, draw_line, draw_marks, set_scale
from rc_probe.reports.figures.svg import MUTED, SAN, THEME, TRANSFORMER
from rc_probe.results.curves import BULK
from rc_probe.results.findings.importance_words import UNITS, criterion, title_of
from rc_probe.results.words import number, signed

SHADES, RING = 12, "M9 6a6 5.4 0 1 0 12 0a6 5.4 0 1 0-12 0z"
STEPS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # changes of the loss that lines are drawn at
APART = 0.13  # of the width of the map, between two labels
DARK, LIGHT = "#111111", "#ffffff"  # on colours that are the same on either page


def map_figure(frame: pd.DataFrame) -> Figure | None:
    """frame: the table `phase`."""
    residual = _grid(frame, BULK, "value")
    if residual.empty:
        return None
    metric = criterion(frame)
    cost = None if metric in (None, BULK) else _grid(frame, str(metric), "change")
    height = 130 + 42 * len(residual)
    with panel_of("phase", f"{title_of(BULK)} at the last layer", width=820, height=height) as panel:
        _colours(panel, frame, residual, cost, str(metric))
        if cost is not None:
            _lines(panel, cost, UNITS.get(str(metric), ""))
        _own(panel, frame, residual)
    caption = "Each cell: both changes at once, on the same weights. Colour: the residual of the bulk at the last layer."
    caption += "" if cost is None else f" Lines: where {title_of(str(metric)).lower()} has risen by so much."
    keys = [Key("the model as it is", THEME[MUTED], mark=RING, hollow=True)]
    return Figure("phase", "A map of two changes", caption, keys, [panel.svg], wide=True)


def _grid(frame: pd.DataFrame, metric: str, column: str) -> pd.DataFrame:
    """Values of y downwards, of x to the right, in the order of the table."""
    rows = frame[frame["metric"] == metric]
    xs, ys = (list(dict.fromkeys(frame[name])) for name in ("x_value", "y_value"))
    return rows.pivot(index="y_value", columns="x_value", values=column).reindex(index=ys, columns=xs)


def _colours(
    panel: Panel, frame: pd.DataFrame, residual: pd.DataFrame, cost: pd.DataFrame | None, metric: str
) -> None:
    import seaborn as sns

    axes, values = panel.axes, residual.to_numpy(dtype=float)
    height, width = values.shape
    top = max(float(np.nanmax(values)) if np.isfinite(values).any() else 1.0, 1e-12)
    edges = np.linspace(0, top, SHADES + 1)
    x, y = frame["x"].iloc[0], frame["y"].iloc[0]
    losses = np.empty_like(values) if cost is None else cost.to_numpy(dtype=float)
    texts = []
    for row, (y_value, own) in enumerate(residual.iterrows()):
        for column, (x_value, value) in enumerate(own.items()):
            more = (
                ""
                if cost is None
                else f", {title_of(metric).lower()} {signed(float(losses[row, column]), 3)}"
            )
            texts.append(f"{x}={x_value}, {y}={y_value}: {number(float(value), 3)}{more}")
    xs, ys = np.arange(width + 1) - 0.5, np.arange(height + 1) - 0.5
    colours = sns.color_palette("crest_r", SHADES).as_hex()
    draw_heat(panel, values, edges, colours, xs=xs, ys=ys, texts=texts, bar=(0.02, 0.025), upwards=True)
    for axis, labels, name in ((axes.xaxis, residual.columns, x), (axes.yaxis, residual.index, y)):
        _labelled(axis, [str(label) for label in labels])
        axis.set_label_text(str(name))
    panel.grid = ""
    known = {text: value for text, value in zip(texts, values.flat, strict=True) if np.isfinite(value)}
    panel.words += [
        f"lowest {min(known, key=lambda k: known[k])}",
        f"highest {max(known, key=lambda k: known[k])}",
    ]


def _labelled(axis: Axis, labels: Sequence[str]) -> None:
    axis.set_major_locator(FixedLocator(range(len(labels))))
    axis.set_major_formatter(FixedFormatter(list(labels)))


def _lines(panel: Panel, cost: pd.DataFrame, unit: str) -> None:
    """Where the loss has risen by so much, with its number on each line."""
    values = np.ma.masked_invalid(cost.to_numpy(dtype=float))
    levels = [step for step in STEPS if values.min() < step < values.max()]
    if min(values.shape) < 2 or not levels:
        return
    for colour, width in ((DARK, 3.2), (LIGHT, 1.5)):
        drawn = panel.axes.contour(values, levels=levels, colors=colour, linewidths=width)
    placed: list[np.ndarray] = []
    for level, lines in zip(drawn.levels, drawn.allsegs, strict=True):
        vertices = np.concatenate(lines) if len(lines) else np.empty((0, 2))
        if not len(vertices):
            continue
        apart = [min((_apart(one, other, values.shape) for other in placed), default=1.0) for one in vertices]
        best = int(np.argmax(apart))
        if apart[best] >= APART:
            placed.append(vertices[best])
            x, y = map(float, vertices[best])
            panel.axes.text(x, y, f"{signed(float(level))}{unit}", color=LIGHT, ha="center", va="center",
                            bbox={"facecolor": DARK, "edgecolor": "none", "pad": 1.5, "alpha": 0.75})  # fmt: skip


def _apart(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """How far two places are from each other, as a share of the map; a label is as wide as three are high."""
    across, up = abs(one - other) / (shape[1], shape[0])
    return float(max(across, 3 * 42 * shape[0] / 820 * up))


def _own(panel: Panel, frame: pd.DataFrame, residual: pd.DataFrame) -> None:
    own = frame[frame["x_own"].eq(True) & frame["y_own"].eq(True)]
    if len(own):
        x, y = (
            list(residual.columns).index(own["x_value"].iloc[0]),
            list(residual.index).index(own["y_value"].iloc[0]),
        )
        for colour, width in ((DARK, 4.0), (LIGHT, 1.8)):
            panel.axes.plot([x], [y], linestyle="none", marker="o", ms=17, mfc="none", mec=colour, mew=width)


def sweeps_figure(frame: pd.DataFrame) -> Figure | None:
    """Each of the two changes alone: the residual of the bulk at the last layer, and the loss."""
    metric = criterion(frame)
    panels = []
    for one, other in (("x", "y"), ("y", "x")):
        rows = frame[frame[f"{other}_own"].eq(True)]
        for shown, colour in ((BULK, TRANSFORMER), (metric, SAN)):
            own = rows[(rows["metric"] == shown) & rows["value"].notna()]
            if len(own) > 1 and not (colour == SAN and shown == BULK):
                panels.append(_sweep(f"sweep{one}{colour[-1]}", own, one, str(shown), colour))
    if not panels:
        return None
    keys = [Key("the model as it is", THEME[MUTED], "4 3")]
    caption = "One of the two is changed, the other is as it is in the model. Bars: 95 % intervals of the change, paired over samples."
    return Figure("sweeps", "One change at a time", caption, keys, panels)


def _sweep(name: str, rows: pd.DataFrame, one: str, metric: str, colour: str) -> str:
    values, labels = rows["value"].astype(float).tolist(), rows[f"{one}_value"].astype(str).tolist()
    title, unit = title_of(metric), UNITS.get(metric, "")
    with panel_of(name, title) as panel:
        axes, places = panel.axes, list(range(len(values)))
        axes.set_xlim(-0.3, len(values) - 0.7)
        ends = (rows["baseline"] + rows[["low", "high"]].T).T.astype(float)
        set_scale(axes, [*values, *ends["low"].dropna(), *ends["high"].dropna()], log=False)
        _labelled(axes.xaxis, labels)
        axes.set_xlabel(str(rows[one].iloc[0]))
        for at in np.flatnonzero(rows[f"{one}_own"].to_numpy(dtype=bool)):
            axes.axvline(float(at), color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.vlines(places, ends["low"], ends["high"], color=colour, linewidth=1.2, alpha=0.6)
        draw_line(axes, places, values, (colour, ()), linewidth=2)
        texts = [f"{label}: {number(value, 3)}{unit}" for label, value in zip(labels, values, strict=True)]
        draw_marks(panel, places, values, colour, texts, hollow=[False] * len(values))
        panel.words += [
            f"{number(values[0])}{unit} at {labels[0]}",
            f"{number(values[-1])}{unit} at {labels[-1]}",
        ]
    return panel.svg
