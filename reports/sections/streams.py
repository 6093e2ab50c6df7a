"""Each of the streams that blocks hand on side by side."""

import pandas as pd

from rc_probe.registry import METRICS, WHOLE
from rc_probe.reports.figures.streams import name, streams_figure
from rc_probe.reports.table_cells import layer_table
from rc_probe.results.curves import Curve
from rc_probe.results.words import number

from .section import Folded, Shown
from .view import View

FEW = 4  # streams that one sentence says one by one


class Streams:
    """Only of models that carry several streams."""

    measurement, title = "streams", "Stream by stream"

    def show(self, view: View, /) -> Shown | None:
        frame = view.table("streams")
        frame = frame[frame["mean"].notna() & frame["metric"].eq(view.metric)].sort_values("layer")
        by_weights = {str(weights): _curves(rows) for weights, rows in frame.groupby("weights", sort=False)}
        shown = by_weights.get("pretrained")
        if not shown:
            return None
        metric = METRICS[view.metric].title
        figure = streams_figure(shown, view.curves().get(("pretrained", WHOLE)), metric)
        every = {(w, name(n)): curve for w, curves in by_weights.items() for n, curve in curves.items()}
        return Shown(
            lead=f"Each block hands on {len(shown)} streams side by side. The curves of the other sections are of "
            "all of them together: a token's vectors, one after the other. Here each stream is by itself.",
            finding=_finding(metric.lower(), shown),
            figures=[figure],
            folded=Folded.of(
                "The numbers", layer_table("streams-by-layer", f"{figure.title}, mean ± std", every)
            ),
        )


def _curves(rows: pd.DataFrame) -> dict[int, Curve]:
    """The curves of one metric and weights by the number of the stream."""
    return {
        int(str(stream)): Curve(
            part["layer"].astype(int).tolist(),
            *(part[c].astype(float).tolist() for c in ("mean", "std", "floor")),
        )
        for stream, part in rows.groupby("stream")
    }


def _finding(metric: str, shown: dict[int, Curve]) -> str:
    last = max(curve.layers[-1] for curve in shown.values())
    ends = {n: curve.means[-1] for n, curve in shown.items()}
    if len(ends) <= FEW:
        each = ", ".join(f"{number(value)} in stream {n}" for n, value in ends.items())
        return f"At layer {last} the {metric} is {each}."
    low, high = min(ends, key=lambda n: ends[n]), max(ends, key=lambda n: ends[n])
    return f"At layer {last} the {metric} goes from {number(ends[low])} in stream {low} to {number(ends[high])} in stream {high}."
