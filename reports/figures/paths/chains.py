"""The figure of chained attention: how fast products of patterns along paths forget which token is which."""

import pandas as pd

from rc_probe.reports.figures.canvas import panel_of
from rc_probe.reports.figures.panels import (
    Figure,
    Key,
    Styles,
    by_layer,
    draw_line,
    draw_marks,
    lowest,
    set_scale,
    svg_dashes,
)
from rc_probe.reports.figures.svg import MUTED, SAN, SAN_MLP, THEME, TRANSFORMER
from rc_probe.results.path_verdict import Series, ends_of, texts_of

_CHAINS = {
    "rank_one": "distance to rank one", "mean_row": "distance to equal rows", "dobrushin": "Dobrushin coefficient",
}  # fmt: skip
_CHAIN_LINES: Styles = {
    _CHAINS["rank_one"]: (TRANSFORMER, ()), _CHAINS["mean_row"]: (SAN, (5, 2.2)),
    _CHAINS["dobrushin"]: (SAN_MLP, (6.5, 2, 1.2, 2)),
}  # fmt: skip


def chains_figure(frame: pd.DataFrame) -> Figure | None:
    """How fast products of attention patterns along random paths forget which token is which.

    frame: the rows of the table `chains` that have a median.
    """
    shown = {
        metric: rows.sort_values("length")
        for metric in _CHAINS
        if len(rows := frame[frame["metric"] == metric])
    }
    if not shown:
        return None
    with panel_of("pchains", "Products of attention patterns, log scale") as panel:
        by_layer(panel.axes, int(frame["length"].max()), "number of patterns in the product")
        panel.axes.set_xlim(left=0.75)
        set_scale(panel.axes, frame[["median", "low"]].to_numpy(float).ravel().tolist(), log=True)
        bottom = lowest(panel.axes)
        for metric, rows in shown.items():
            name = _CHAINS[metric]
            low, median, high = (rows[c].astype(float).clip(lower=bottom) for c in ("low", "median", "high"))
            panel.axes.fill_between(
                rows["length"], low, high, color=_CHAIN_LINES[name][0], alpha=0.14, linewidth=0
            )
            lengths = rows["length"].astype(int).tolist()
            draw_line(panel.axes, lengths, median.tolist(), _CHAIN_LINES[name], linewidth=2)
            one = Series(*(rows[c].tolist() for c in ("length", "median", "low", "high")))
            texts = [text.replace("k =", "length") for text in texts_of(name, one)]
            draw_marks(
                panel, lengths, median.tolist(), _CHAIN_LINES[name][0], texts, hollow=[False] * len(lengths)
            )
            panel.words.append(ends_of(name, one))
    keys = [
        Key(_CHAINS[m], THEME[_CHAIN_LINES[_CHAINS[m]][0]], svg_dashes(_CHAIN_LINES[_CHAINS[m]][1]))
        for m in shown
    ]
    keys.append(Key("quartiles", THEME[MUTED], band=True))
    caption = (
        "Attention patterns multiplied along random paths, the later layer on the left; medians over paths and "
        "samples. At rank one every token gets the same mixture"
    )
    caption += (
        "; a small Dobrushin coefficient certifies it: no two rows of the product are farther apart."
        if "dobrushin" in shown
        else "."
    )
    return Figure("chains", "Attention chained along paths", caption, keys, [panel.svg])
