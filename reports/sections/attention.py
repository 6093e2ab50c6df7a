"""The model's own attention: its sinks by name, its heads as heat maps, its mask."""

import pandas as pd

from rc_probe.registry import ATTENTION_METRICS
from rc_probe.reports.figures.heads.attention import heads_figures, products_figure
from rc_probe.reports.table_cells import Table, cell
from rc_probe.results.words import THINGS, many

from .section import Folded, Shown
from .view import View

MOST_ROWS = 50  # of tokens; the file has all


class OwnAttention:
    """What each head does on a few samples, and what all of them together let through."""

    measurement, title = "attention", "The model’s own attention"

    def show(self, view: View, /) -> Shown | None:
        frame, found = view.table("attention"), view.found(self.measurement)
        if frame["mean"].notna().sum() == 0 or not found:
            return None
        read = many(
            int(frame["count"].max()), THINGS.get(str(view.result.settings.get("modality")), "samples")
        )
        products = products_figure(view.table("attention_masks"))
        return Shown(
            lead=f"Which token each head attends to, how evenly, and how near that is to giving all tokens the same; on {read}.",
            finding=found["sentence"],
            reasons=found.get("reasons", ()),
            figures=[*heads_figures(frame), *([products] if products else [])],
            folded=Folded.of(
                "The numbers", _by_block(frame), _largest(view), view.whole("attention_masks")
            ),
        )  # fmt: skip


def _by_block(frame: pd.DataFrame) -> Table:
    """Means over the heads: a row for each block."""
    rows = frame[frame["head"].isna()]
    wide = rows.pivot_table(index=["component", "block"], columns="metric", values="mean")
    names = [name for name in ATTENTION_METRICS if name in wide]
    heading = ["component", "block", *(ATTENTION_METRICS[name].title for name in names)]
    cells = [
        [cell(str(component)), cell(int(block)), *map(cell, values)]
        for (component, block), values in zip(wide.index, wide[names].to_numpy(float).tolist(), strict=True)
    ]
    return Table("attention", "By block, mean over heads; each head is in attention.csv", heading, cells)


def _largest(view: View) -> Table | None:
    """The sinks by token: how many heads, the most attention."""
    frame = view.table("attention_sinks")
    if frame.empty:
        return None
    found: list[tuple[str, int, str, int, int, float]] = []
    for _, own in frame.groupby(["component", "position", "token"], dropna=False):
        heads = len(own[["block", "head"]].drop_duplicates())
        first, most = own.iloc[0], float(own["attention"].max())
        found.append(
            (
                first["component"],
                int(first["position"]),
                first["token"],
                heads,
                int(own["samples"].max()),
                most,
            )
        )
    found.sort(key=lambda row: -row[3])
    heading = ["component", "position", "token", "heads", "samples", "most attention"]
    title = "Tokens that get over .3 of a head’s attention; each head’s are in attention_sinks.csv"
    return Table(
        "attention-sinks", title, heading, [[cell(value) for value in row] for row in found[:MOST_ROWS]]
    )
