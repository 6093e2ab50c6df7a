"""Truncation in pictures: cost, rows of attention and tokens found against the rank; collapse by layer for each rank."""

from collections.abc import Mapping, Sequence
from math import log2

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator

from rc_probe.reports.figures.canvas import panel_of
from rc_probe.reports.figures.panels import (
    Figure,
    Key,
    Styles,
    by_layer,
    draw_line,
    draw_marks,
    set_scale,
    svg_dashes,
)
from rc_probe.reports.figures.svg import MORE, SAN, SAN_MLP, SAN_SKIP, THEME, TRANSFORMER
from rc_probe.results.findings.heads.truncation_words import METHODS, of_all
from rc_probe.results.findings.importance_words import UNITS, title_of
from rc_probe.results.words import number

from .maps import draw_map

LOOKS: Styles = {
    "weights": (TRANSFORMER, ()), "data": (SAN_SKIP, ()), "bottom": (SAN, (5, 2.2)), "random": (SAN_MLP, (1.2, 1.8)),
}  # fmt: skip
RANKS = (SAN, SAN_MLP, SAN_SKIP, *MORE)  # colours of ranks, the least first
FULL: tuple[str, tuple[float, ...]] = (TRANSFORMER, (5, 2.2))
NETWORKS = {"SAN": "Pure attention (SAN)", "transformer": "The whole model"}


def rank_figure(frame: pd.DataFrame, metric: str, width: int) -> Figure | None:
    """Against the rank: change of the criterion and KL of attention rows with all heads truncated, and tokens found."""
    unit = UNITS.get(metric, "")
    panels = [
        _panel(
            "tcost",
            f"{title_of(metric)}, change",
            _lines(of_all(frame, metric), "change"),
            width,
            0.0,
            unit,
        ),
        _panel(
            "tkl", "KL of attention rows", _lines(of_all(frame, "attention_kl"), "value"), width, 0.0, " nats"
        ),
        _panel(
            "tfound",
            "Share of tokens found",
            _lines(frame[frame["metric"] == "retrieval"], "value"),
            width,
            1.0,
            "",
        ),
    ]
    keys = [Key(METHODS[m], THEME[colour], svg_dashes(dashes)) for m, (colour, dashes) in LOOKS.items()]
    caption = (
        "The first two: every head of the model at one rank. Tokens found: the best other token of the whole head, found by qᵀPk at equal "
        "positions; mean over the heads of the named blocks. The last rank is the width of a head, the model as it is."
    )
    shown = [panel for panel in panels if panel]
    return Figure("truncation", "What heads of less rank cost", caption, keys, shown) if shown else None


def _lines(rows: pd.DataFrame, column: str) -> dict[str, dict[int, float]]:
    """By method, the mean by rank."""
    means = rows.groupby(["method", "rank"])[column].mean()
    return {
        m: {int(r): float(v) for r, v in means[m].items()}
        for m in METHODS
        if m in means.index.get_level_values(0)
    }


def _panel(
    name: str, title: str, lines: Mapping[str, Mapping[int, float]], width: int, full: float, unit: str
) -> str:
    """full: the value at the width of a head."""
    if not lines:
        return ""
    with panel_of(name, title) as panel:
        set_scale(panel.axes, [full, *(v for line in lines.values() for v in line.values())], log=False)
        for method, line in lines.items():
            ranks, values = [*line, width], [*line.values(), full]
            places = [_place(rank) for rank in ranks]
            draw_line(panel.axes, places, values, LOOKS[method], linewidth=2)
            texts = [
                f"{METHODS[method]}, rank {r}: {number(v, 3)}{unit}"
                for r, v in zip(ranks, values, strict=True)
            ]
            draw_marks(panel, places, values, LOOKS[method][0], texts, hollow=[False] * len(ranks))
            panel.words.append(f"{METHODS[method]} {number(values[0])}{unit} at rank {ranks[0]}")
        _rank_axis(panel.axes, sorted({*(r for line in lines.values() for r in line), width}))
    return panel.svg


def _place(rank: int) -> float:
    """Ranks as powers of two, and 0 one step before 1."""
    return log2(rank) if rank else -1.0


def _rank_axis(axes: Axes, ranks: Sequence[int]) -> None:
    places = [_place(rank) for rank in ranks]
    axes.set_xlim(min(places) - 0.2, max(places) + 0.2)
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_major_formatter(FixedFormatter([str(rank) for rank in ranks]))
    axes.set_xlabel("rank")


def collapse_figure(curves: pd.DataFrame, method: str = "weights") -> Figure | None:
    """The residual of the bulk by layer with all heads at each rank, of pure attention and of the whole model."""
    rows = curves[(curves["method"] == method) & (curves["metric"] == "residual_bulk")]
    if rows.empty:
        return None
    ranks = sorted({int(rank) for rank in rows["rank"]})[: len(RANKS)]
    styles = {rank: (RANKS[place], ()) for place, rank in enumerate(ranks)}
    panels = [
        _collapse(f"tcollapse{network[0]}", title, rows[rows["network"] == network], styles, log=network == "SAN")
        for network, title in NETWORKS.items() if network in set(rows["network"])
    ]  # fmt: skip
    keys = [Key(f"rank {rank}", THEME[styles[rank][0]]) for rank in ranks]
    keys.append(Key("full rank", THEME[FULL[0]], svg_dashes(FULL[1])))
    caption = (
        f"Residual of the bulk, all heads at one rank, {METHODS[method]}. Less rank makes attention flatter, and flatter attention collapses "
        "faster where nothing holds tokens apart (Dong et al. 2021 beside Amsel et al. 2024)."
    )
    return Figure("truncation-collapse", "Rank and collapse", caption, keys, panels)


def _collapse(
    name: str,
    title: str,
    rows: pd.DataFrame,
    styles: Mapping[int, tuple[str, tuple[float, ...]]],
    *,
    log: bool,
) -> str:
    with panel_of(name, title + (", log scale" if log else "")) as panel:
        by_layer(panel.axes, int(rows["layer"].max()))
        set_scale(panel.axes, [*rows["value"], *rows["baseline"]], log=log, full=not log)
        lines = {f"rank {rank}": (rows[rows["rank"] == rank], "value", styles[rank]) for rank in styles}
        first = rows[rows["rank"] == next(iter(styles))]
        for label, (own, column, style) in {**lines, "full rank": (first, "baseline", FULL)}.items():
            layers, values = own["layer"].tolist(), own[column].tolist()
            draw_line(panel.axes, layers, values, style, linewidth=2)
            texts = [f"{label}, layer {n}: {number(v, 3)}" for n, v in zip(layers, values, strict=True)]
            draw_marks(panel, layers, values, style[0], texts, hollow=[False] * len(layers))
            if values:
                panel.words.append(f"{label} {number(values[-1])} at layer {layers[-1]}")
    return panel.svg


def smallest_figure(frame: pd.DataFrame, width: int) -> Figure | None:
    """The smallest rank of each head of the named blocks."""
    rows = frame[frame["metric"] == "smallest_rank"]
    if rows.empty:
        return None
    grid = rows.pivot_table(index="head", columns="block", values="value").sort_index()
    with panel_of("tsmallest", "Smallest rank of each head", height=100 + min(14 * len(grid), 240)) as panel:
        draw_map(panel, grid, "smallest rank", 0.0, float(width))
    return Figure(
        "truncation-smallest",
        "How small each head could be",
        "Each head alone, all others whole; by the data.",
        [],
        [panel.svg],
    )
