"""Errors of trained attention by rank, number of heads, depth and context length."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from rc_probe.reports.figures.canvas import Panel, panel_of
from rc_probe.reports.figures.panels import Dashes, Figure, Key, draw_line, draw_marks, set_scale, svg_dashes
from rc_probe.reports.figures.svg import MORE, MUTED, SAN, SAN_MLP, SAN_SKIP, THEME, TRANSFORMER
from rc_probe.results.words import number

Lines = Mapping[str, pd.DataFrame]  # rows by the name of their line
STYLES: Sequence[tuple[str, Dashes]] = (
    (TRANSFORMER, ()),
    (SAN, (5, 2.2)),
    (SAN_SKIP, (6.5, 2, 1.2, 2)),
    (SAN_MLP, (1.2, 1.8)),
    (MORE[0], (3, 1.5)),
)
SPLITS = "every split of 512 parameters"


def heads_figure(heads: Lines, splits: pd.DataFrame, truncation: pd.DataFrame) -> Figure:
    """heads: of rank 1 by their number, for each width; splits: of equal parameters; truncation: of the full head by rank."""
    styles = dict(zip(heads, STYLES, strict=False))
    keys = _keys({**styles, SPLITS: STYLES[0]}) if not heads else _keys(styles)
    keys.append(Key("the plateau ½ (1 − d κ²)", THEME[MUTED], svg_dashes((3, 2)), width=1.2))
    panels = []
    with panel_of("nheads", "Heads of rank 1", width=330, height=250) as panel:
        _axes(
            panel,
            [rows["heads"] for rows in heads.values()],
            "number of heads",
            [rows["error"] for rows in heads.values()],
        )
        for name, rows in heads.items():
            law = float(rows["law"].iloc[0])
            panel.axes.axhline(
                law,
                color=MUTED,
                linewidth=1.1,
                linestyle=(0, (3, 2)),
                gid=panel.hover([f"{name}: {number(law, 3)}"]),
            )
            _line(panel, name, rows, "heads", styles[name])
            panel.words.append(f"the plateau of {name} is {number(law, 3)}")
    panels.append(panel.svg)
    for short, title, rows in (
        ("nsplit", "Equal parameters, r H = d", splits),
        ("ncut", "The full head, cut to a rank", truncation[truncation["rank"] > 0]),
    ):
        with panel_of(short, title, width=330, height=250) as panel:
            _axes(panel, [rows["rank"]], "rank", [rows["error"]])
            _line(panel, "error", rows, "rank", STYLES[0])
        panels.append(panel.svg)
    caption = (
        "Mean squared distance to the nearer of two orthogonal points; the mean of both would be 0.5 off. Marks are means over the "
        "seeds, bars go from the lowest seed to the highest."
    )
    return Figure("heads", "One layer, two points", caption, keys, panels, small=True)


def encoders_figure(depths: Lines, contexts: Lines) -> Figure:
    """Errors by rank, a line for each depth, and one for each number of points."""
    styles = dict(zip([*depths, *contexts], (*STYLES, *STYLES), strict=False))
    if len(depths) + len(contexts) <= len(STYLES):
        styles = dict(zip([*depths, *contexts], STYLES, strict=False))
    panels = []
    for short, title, lines in (
        ("ndepth", "By depth", depths),
        ("ncontext", "By number of points", contexts),
    ):
        with panel_of(short, title) as panel:
            _axes(
                panel,
                [rows["rank"] for rows in lines.values()],
                "rank (r H = d)",
                [rows["error"] for rows in lines.values()],
            )
            for name, rows in lines.items():
                _line(panel, name, rows, "rank", styles[name])
        panels.append(panel.svg)
    caption = "Encoder layers with skips, MLPs and norms, on the farthest of uniform points; to say nothing is 1 off. Bars are of the seeds."
    return Figure("encoders", "Depth and context length", caption, _keys(styles), panels)


def _keys(styles: Mapping[str, tuple[str, Dashes]]) -> list[Key]:
    return [Key(name, THEME[colour], svg_dashes(dashes)) for name, (colour, dashes) in styles.items()]


def _axes(panel: Panel, xs: Sequence[pd.Series], label: str, ys: Sequence[pd.Series]) -> None:
    axes = panel.axes
    ticks = sorted({int(x) for one in xs for x in one})
    axes.set_xscale("log", base=2)
    axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    shown = ticks if len(ticks) < 9 else [tick for tick in ticks if tick & (tick - 1) == 0]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FixedFormatter([str(tick) for tick in shown]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    set_scale(axes, [float(y) for one in ys for y in one], log=False)


def _line(panel: Panel, name: str, rows: pd.DataFrame, by: str, style: tuple[str, Dashes]) -> None:
    """Means over seeds, joined, with a bar from the lowest to the highest."""
    found = rows.groupby(by)["error"].agg(["mean", "min", "max"]).reset_index()
    xs, means = [float(x) for x in found[by]], found["mean"].tolist()
    panel.axes.vlines(xs, found["min"], found["max"], color=style[0], linewidth=1.1)
    draw_line(panel.axes, xs, means, style, linewidth=1.8)
    texts = [f"{name}, {by} {x:.0f}: {number(y, 3)}" for x, y in zip(xs, means, strict=True)]
    draw_marks(panel, xs, means, style[0], texts, hollow=[False] * len(xs))
    panel.words.append(
        f"{name} {number(means[0])} at {by} {xs[0]:.0f}, {number(means[-1])} at {by} {xs[-1]:.0f}"
    )
