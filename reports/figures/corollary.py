"""MLPs against the collapse: how much they enlarge a residual, beside how fast tokens come together."""

import math

import pandas as pd

from rc_probe.registry import PAPER
from rc_probe.results.words import WEIGHTS, number

from .canvas import panel_of
from .panels import STYLES, Figure, Key, Styles, by_layer, draw_line, draw_marks, set_scale, svg_dashes
from .svg import MUTED, THEME, TRANSFORMER

SAN, SAN_MLP, *_ = PAPER
_LINES: Styles = {
    "lipschitz": (MUTED, (3, 2)), "gain": (TRANSFORMER, ()), "rate": STYLES[SAN_MLP], "rate_san": STYLES[SAN],
}  # fmt: skip
_NAMES = {
    "lipschitz": "λ, from the weights", "gain": "what the MLP does to the residual", "rate": f"residual of {SAN_MLP}, over that before",
    "rate_san": f"residual of {SAN}, over that before",
}  # fmt: skip


def corollary_figure(frame: pd.DataFrame) -> Figure | None:
    """One panel for each weights; frame: the table `corollary`."""
    panels = []
    for weights, rows in frame[frame["gain"].notna()].groupby("weights", sort=False):
        title = f"{WEIGHTS.get(str(weights), str(weights))}, log scale"
        with panel_of(f"corollary-{weights}", title) as panel:
            by_layer(panel.axes, int(rows["layer"].max()), "block")
            panel.axes.set_xlim(left=0.75)
            set_scale(panel.axes, rows[list(_LINES)].to_numpy(float).ravel().tolist(), log=True)
            layers = [int(layer) for layer in rows["layer"]]
            for name, style in _LINES.items():
                values = rows[name].astype(float).tolist()
                known = [value for value in values if math.isfinite(value)]
                if not known:
                    continue
                draw_line(panel.axes, layers, values, style, linewidth=2)
                texts = [
                    f"{_NAMES[name]}, block {n}: {number(v, 3)}" for n, v in zip(layers, values, strict=True)
                ]
                draw_marks(panel, layers, values, style[0], texts, hollow=[False] * len(layers))
                panel.words.append(f"{_NAMES[name]} {number(min(known))} to {number(max(known))}")
        panels.append(panel.svg)
    keys = [Key(_NAMES[name], THEME[colour], svg_dashes(dashes)) for name, (colour, dashes) in _LINES.items()]
    caption = (
        "The trade-off of corollary 3.2: the larger the Lipschitz constant λ of an MLP, the less the theorem can promise that "
        "tokens come together, and the more an input’s noise can grow."
    )
    return Figure("corollary", "MLPs against the collapse", caption, keys, panels) if panels else None
