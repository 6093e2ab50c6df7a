"""Where two tokens end, and how orthogonal values make tokens equal in spite of a norm."""

import pandas as pd

from rc_probe.reports.figures.canvas import panel_of
from rc_probe.reports.figures.panels import Figure, Key, Styles, draw_line, draw_marks, set_scale, svg_dashes
from rc_probe.reports.figures.svg import MUTED, SAN, SAN_SKIP, THEME, TRANSFORMER
from rc_probe.results.words import number

WEIGHT, STEP = 2.0, 6.0  # w of the panel; degrees between two marks
MASKS: Styles = {
    "complete": (SAN, (1.2, 1.8)), "causal": (TRANSFORMER, ()), "neighbours": (SAN_SKIP, (5, 2.2)),
}  # fmt: skip
DISC = "M15 2.5a3.5 3.5 0 1 0 .01 0z"


def equilibria_figure(two: pd.DataFrame, orthogonal: pd.DataFrame) -> Figure:
    """two, orthogonal: the tables of the first seed."""
    keys = [
        Key("with the norm", THEME[TRANSFORMER], mark=DISC),
        Key("without it", THEME[MUTED], mark=DISC, hollow=True),
        *(Key(f"{name} mask", THEME[colour], svg_dashes(dashes)) for name, (colour, dashes) in MASKS.items()),
    ]
    caption = (
        f"Left: the first of two tokens is at 90°, w = {WEIGHT:g}; each mark is a start of the second, and the cosine between both at "
        "the end: 1 is collapse. Right: 32 random tokens through layers with orthogonal values and the norm, by mask. First seed."
    )
    return Figure(
        "equilibria",
        "What the norm prevents, and what it does not",
        caption,
        keys,
        [_two(two), _orthogonal(orthogonal)],
    )


def _two(frame: pd.DataFrame) -> str:
    with panel_of("etwo", "Cosine by start of token 2") as panel:
        axes = panel.axes
        axes.set_xlim(-5, 365)
        axes.set_xticks([0, 90, 180, 270, 360])
        axes.set_xlabel("angle at the start (degrees)")
        set_scale(axes, [-1.0, 1.0], log=False)
        for norm, colour in ((False, MUTED), (True, TRANSFORMER)):
            rows = frame[(frame["weight"] == WEIGHT) & (frame["norm"] == norm)].sort_values("start")
            rows = rows.groupby((rows["start"] // STEP), as_index=False).first()
            name = f"{'with' if norm else 'without'} the norm"
            xs, ys = rows["start"].tolist(), rows["cosine"].tolist()
            texts = [f"{name}, from {x:.0f}°: {number(y, 3)}" for x, y in zip(xs, ys, strict=True)]
            draw_marks(panel, xs, ys, colour, texts, hollow=[not norm] * len(xs), size=4)
            panel.words.append(f"{name} cosines from {number(min(ys))} to {number(max(ys))}")
    return panel.svg


def _orthogonal(frame: pd.DataFrame) -> str:
    with panel_of("eorth", "Relative residual, log scale") as panel:
        axes = panel.axes
        axes.set_xlabel("layer")
        axes.set_xlim(-2, float(frame["layer"].max()) + 2)
        set_scale(axes, [1e-16, *frame["residual"].tolist()], log=True)
        for name, rows in frame.groupby("mask", sort=False):
            xs, ys = rows["layer"].tolist(), rows["residual"].tolist()
            draw_line(axes, xs, ys, MASKS[str(name)], linewidth=2)
            ends = [xs[0], xs[-1]], [ys[0], ys[-1]]
            texts = [f"{name}, layer {x}: {number(y, 3)}" for x, y in zip(*ends, strict=True)]
            draw_marks(panel, *ends, MASKS[str(name)][0], texts, hollow=[False] * 2)
            panel.words.append(f"{name} {number(ys[0])} at layer 0, {number(ys[-1])} at layer {xs[-1]}")
    return panel.svg
