"""Two tokens on a circle: where they go, and how far apart they are."""

import numpy as np
import pandas as pd
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from rc_probe.reports.figures.canvas import panel_of
from rc_probe.reports.figures.panels import Figure, Key, draw_line, draw_marks, set_scale, svg_dashes
from rc_probe.reports.figures.svg import MUTED, SAN, SAN_MLP, SAN_SKIP, THEME, TRANSFORMER
from rc_probe.results.words import number

ARMS = {
    "pure": (SAN, (1.2, 1.8)), "MLP": (SAN_MLP, (5, 2.2)), "skip": (SAN_SKIP, (6.5, 2, 1.2, 2)),
    "skip and MLP": (TRANSFORMER, ()),
}  # fmt: skip
TOKENS = {"token 1": TRANSFORMER, "token 2": SAN}
EQUAL = 1e-7  # float32 cannot tell points of the circle closer than this apart
TICKS = (1, 2, 4, 11, 31, 101, 301)  # steps + 1


def trajectories_figure(frame: pd.DataFrame, radius: float, training: str) -> Figure:
    """A small panel for each width and arm, named so. frame: the table `trajectories` of the first seed and one training."""
    keys = [Key(name, THEME[colour]) for name, colour in TOKENS.items()]
    keys.append(Key("the circle", THEME[MUTED], svg_dashes((3, 2)), width=1.2))
    panels = [
        _ways(
            frame[(frame["width"] == width) & (frame["arm"] == arm)],
            f"{training[0]}{width}",
            f"{width}: {arm}",
            radius,
        )
        for width, arm in frame[["width", "arm"]].drop_duplicates().itertuples(index=False, name=None)
    ]
    caption = "A panel for each width and arm. Each network is fed its own answers for 300 steps. A disc is where a token starts, a ring where it ends. First seed."
    return Figure(
        f"ways-{training}", f"Where the tokens go, {training} training", caption, keys, panels, small=True
    )


def _ways(rows: pd.DataFrame, short: str, title: str, radius: float) -> str:
    arm = "".join(word[0] for word in title.split(": ")[1].split())
    with panel_of(f"cway{short}{arm}", title, width=250, height=250) as panel:
        axes, edge = (
            panel.axes,
            1.15 * max(radius, float(rows[["x1", "y1", "x2", "y2"]].abs().to_numpy().max())),
        )
        axes.set_xlim(-edge, edge)
        axes.set_ylim(-edge, edge)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(FixedLocator([-radius, 0, radius]))
        turn = np.linspace(0, 2 * np.pi, 100)
        draw_line(
            axes,
            (radius * np.cos(turn)).tolist(),
            (radius * np.sin(turn)).tolist(),
            (MUTED, (3, 2)),
            linewidth=1,
        )
        for (name, colour), token in zip(TOKENS.items(), "12", strict=True):
            xs, ys = rows[f"x{token}"].tolist(), rows[f"y{token}"].tolist()
            draw_line(axes, xs, ys, (colour, ()), linewidth=1.6)
            ends = [xs[0], xs[-1]], [ys[0], ys[-1]]
            steps = [int(rows["step"].iloc[i]) for i in (0, -1)]
            texts = [
                f"{name}, step {s}: {number(x)}, {number(y)}" for s, x, y in zip(steps, *ends, strict=True)
            ]
            draw_marks(panel, *ends, colour, texts, hollow=[False, True], size=5)
        last = rows.iloc[-1]
        panel.words.append(f"the tokens are {number(last['distance'])} apart after {int(last['step'])} steps")
    return panel.svg


def distances_figure(frame: pd.DataFrame) -> Figure:
    """A panel for each width, a line for each seed and arm. frame: the table `trajectories`."""
    keys = [Key(name, THEME[colour], svg_dashes(dashes)) for name, (colour, dashes) in ARMS.items()]
    panels = [
        _distances(frame[(frame["width"] == width) & (frame["training"] == training)], width, training)
        for training, width in frame[["training", "width"]]
        .drop_duplicates()
        .itertuples(index=False, name=None)
    ]
    caption = "A line for each seed. Both axes are logarithmic; what is closer than float32 can tell is drawn at 10⁻⁷."
    return Figure("distances", "How far apart the tokens are", caption, keys, panels, small=len(panels) > 2)


def _distances(frame: pd.DataFrame, width: int, training: str) -> str:
    """Rows of one width and training."""
    with panel_of(
        f"cdist{training[0]}{width}", f"width {width}, {training} training", width=330, height=250
    ) as panel:
        axes = panel.axes
        set_scale(axes, [4 * EQUAL, 1.0, float(frame["distance"].max())], log=True)
        axes.set_xscale("log")
        axes.set_xlim(0.93, 320)
        axes.xaxis.set_major_locator(FixedLocator(TICKS))
        axes.xaxis.set_major_formatter(FixedFormatter([str(tick - 1) for tick in TICKS]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("step")
        for arm, style in ARMS.items():
            rows = frame[frame["arm"] == arm]
            for _, one in rows.groupby("seed"):
                draw_line(
                    axes,
                    (one["step"] + 1).tolist(),
                    one["distance"].clip(lower=EQUAL).tolist(),
                    style,
                    linewidth=1.5,
                )
            tenth = rows.loc[rows["step"] == 10, "distance"]
            panel.words.append(f"{arm}: {number(tenth.min())} to {number(tenth.max())} at step 10")
    return panel.svg
