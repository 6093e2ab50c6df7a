"""What a table is, and the columns that several share. Frames, CSV, headings, tooltips and docs/tables.md come from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rc_probe.hooks.errors import RcProbeError

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]  # a cell for each column
TYPES = {
    "str": "text", "int64": "whole number", "float64": "number", "bool": "yes or no", "Int64": "whole number",
    "boolean": "yes or no",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column. dtype: of pandas; heading: in the report, where the name alone does not say it."""

    name: str
    dtype: str
    meaning: str
    heading: str = ""

    def series(self, cells: list[Any]) -> pd.Series:
        """The cells with the column's dtype; whole numbers with a missing one among them are floats, as in pandas."""
        import pandas as pd

        floats = self.dtype == "int64" and any(cell is None for cell in cells)
        return pd.Series(cells, dtype="float64" if floats else self.dtype)


@dataclass(frozen=True)
class Table:
    """A table. title: what its rows are."""

    name: str
    title: str
    columns: tuple[Column, ...]

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]

    def frame(self, rows: Iterable[Row]) -> pd.DataFrame:
        """The rows as a frame. Raises RcProbeError for a row with other columns than these."""
        import pandas as pd

        rows, names = list(rows), self.names
        for row in rows:
            if row.keys() != set(names):
                odd = ", ".join(sorted(row.keys() ^ set(names)))
                raise RcProbeError(f"a row has other columns: {odd}", where=f"table {self.name}")
        return pd.DataFrame({one.name: one.series([row[one.name] for row in rows]) for one in self.columns})

    def read(self, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
        """This table among those of a result: without rows where it was not measured, all columns there."""
        import pandas as pd

        return tables.get(self.name, pd.DataFrame()).reindex(columns=self.names)

    def without(self, *names: str) -> Table:
        """The table without some of its columns."""
        return Table(self.name, self.title, tuple(c for c in self.columns if c.name not in names))


def _named(*tables: Table) -> dict[str, Table]:
    return {table.name: table for table in tables}


WEIGHTS = Column("weights", "str", "`pretrained`, or `init`: the same config, freshly initialised")
VARIANT = Column(
    "variant", "str", "`transformer` (the whole model), `SAN`, `SAN+MLP`, `SAN+skip`, or an ablation"
)
LAYER = Column("layer", "int64", "a point of the stream: 0 is what enters block 1, l what leaves block l")
METRIC = Column("metric", "str", "what the number is")
STREAMS = Column("stream", "int64", "which of the streams that blocks hand on side by side, from 1")
STREAM = (
    LAYER,
    METRIC,
    Column("mean", "float64", "mean over samples"),
    Column("std", "float64", "standard deviation over samples (ddof 1); empty for one sample"),
    Column("count", "int64", "how many samples"),
    Column("floor", "float64", "rounding floor: up to here the number is noise"),
)
SPREAD = (
    Column("std", "float64", "standard deviation (ddof 1); empty for one value"),
    Column(
        "low",
        "float64",
        "lower end of the 95 % interval of the mean; empty for a mean of fewer than 8 samples",
    ),
    Column("high", "float64", "upper end of it"),
)
BASELINE = (
    Column("baseline", "float64", "the same of the whole model"),
    Column("change", "float64", "value − baseline"),
)

# Of every run; its measurements bring their own (rc_probe.measures).
RUN_TABLES = _named(
    Table("structure", "Blocks, junctions and branches", (
        Column("block", "int64", "number of the block, from 1"),
        Column("name", "str", "name of the block's module", "module"),
        Column("call", "int64", "which of the module's calls, from 1: blocks may share their weights"),
        Column("junction", "int64", "which add of the block, from 1"),
        Column("kind", "str", "what the branch does: attention, cross, mlp, mixer"),
        Column("norm_after", "str", "norms between the add and the next branch (post-LN)", "norm after the add"),
        Column("parallel", "bool", "whether several branches meet at the add"),
        Column("heads", "int64", "of attention, where they are known"),
        Column("attention_op", "str", "what computes the attention"),
    )),
    Table("checks", "What was checked", (
        Column("check", "str", "the condition, as it was written"),
        Column("metric", "str", "what it is about"),
        Column("variant", "str", "of which variant"),
        Column("layer", "Int64", "where; empty for a mean over the layers"),
        Column("value", "float64", "what was found"),
        Column("limit", "float64", "what it was compared with"),
        Column("passed", "boolean", "empty where the check could not be evaluated"),
        Column("said", "str", "the numbers, or why it could not be evaluated"),
    )),
)  # fmt: skip

# Of a comparison. `step` is there where the runs are checkpoints of a training.
RUN, STEP = Column("run", "str", "name of the run"), Column("step", "int64", "of the training")
COMPARED = _named(
    Table("runs", "One row per run", (
        RUN, STEP,
        Column("first", "float64", "relative residual at layer 0", "layer 0"),
        Column("first_change", "float64", "first − that of the first run", "change"),
        Column("last", "float64", "at the last layer", "last layer"),
        Column("last_change", "float64", "last − that of the first run", "change"),
        Column("lowest", "float64", "lowest of all layers"),
        Column("lowest_change", "float64", "lowest − that of the first run", "change"),
        Column("lowest_layer", "int64", "where that is", "at layer"),
        Column("level", "str", "`healthy`, `watch` or `collapsed`"),
        Column("model", "str", "what was measured"),
        Column("revision", "str", "its commit on the Hub"),
        Column("class", "str", "its class"),
        Column("blocks", "int64", "how many blocks it has"),
        Column("parameters", "int64", "how many weights it has"),
        Column("dtype", "str", "what it was computed in"),
        Column("seed", "int64", "of fresh weights"),
        Column("samples", "int64", "how many were measured"),
        Column("tokens", "int64", "how many tokens they became; empty for images and sounds"),
    )),
    Table("changes", "Metrics of the whole model against those of the first run", (
        RUN, METRIC, LAYER,
        Column("value", "float64", "mean over samples"),
        Column("baseline", "float64", "the same of the first run"),
        Column("change", "float64", "value − baseline"),
        Column("floor", "float64", "rounding floor of both together: up to here the change is noise"),
    )),
    Table("differences", "What was not measured alike", (
        Column("setting", "str", "what differs"), RUN, Column("value", "str", "what it was in this run"),
    )),
    Table("failures", "Runs that failed", (
        Column("name", "str", "name of the run", "run"), Column("error", "str", "why there is no result", "why"),
    )),
)  # fmt: skip

# Of two models side by side (`rc-probe diff`).
DIFFED = _named(
    Table("differences", "How far the second model is from the first", (
        Column("component", "str", "`stream` (by layer), `block`, or the kind of a branch: `attention`, `mlp`, … (by block), `predictions`"),
        Column("block", "Int64", "number of the block, from 1; of blocks and branches"),
        Column("layer", "Int64", "a point of the stream of the first model: 0 is what enters block 1, l what leaves block l"),
        Column("metric", "str", "what the number is; `change_…` is that of the second model minus that of the first"),
        Column("mean", "float64", "mean over samples; of a loss over predictions; CKA is one number of all samples"),
        Column("std", "float64", "standard deviation over samples (ddof 1); empty for one sample, and for CKA"),
        Column("count", "int64", "how many samples"),
    )),
    RUN_TABLES["checks"],
)  # fmt: skip

# Of an experiment (`rc-probe experiment NAME`), which brings its other tables.
CLAIMS = _named(
    Table("claims", "What is claimed, and what was measured", (
        Column("claim", "str", "what is claimed"),
        Column("source", "str", "who claims it, and where"),
        Column("expected", "str", "where the number of every seed has to be for the claim to hold"),
        Column("measured", "float64", "mean over seeds; empty where these sizes did not measure it"),
        Column("low", "float64", "lowest of the seeds"),
        Column("high", "float64", "highest of the seeds"),
        Column("seeds", "int64", "how many seeds"),
        Column("holds", "boolean", "whether it holds with every seed; empty where it was not measured"),
    )),
)  # fmt: skip

# What `frame()` and `lm-eval` give, in no result.
FRAMES = _named(
    Table("attach", "Every metric at every layer", STREAM),
    Table("attach_streams", "Every metric at every layer, of each of several streams", (STREAMS, *STREAM)),
    Table("monitor", "Every metric at every layer, at every measurement", (STEP, *STREAM)),
    Table("lm_eval", "Scores of the harness", (
        Column("task", "str", "name of the task"),
        Column("metric", "str", "of the harness, with its filter after a comma"),
        Column("ablation", "str", "what is off; `none` first"),
        Column("value", "float64", "the score"),
        Column("stderr", "float64", "its standard error; empty where the harness gives none"),
        *BASELINE,
    )),
)  # fmt: skip


def page(parts: Mapping[str, Iterable[Table]]) -> str:
    """docs/tables.md: tables by heading."""
    lines = [
        "# The tables", "",
        "Written by `python -m rc_probe.comparison`. Every table of `results.json` is also a CSV file; an empty "
        "cell is a number that is not known.",
    ]  # fmt: skip
    for heading, tables in parts.items():
        lines += ["", f"## {heading}"]
        for table in tables:
            head = ["| column | type | meaning |", "|---|---|---|"]
            lines += ["", f"### {table.name}", "", f"{table.title}.", "", *head]
            lines += [f"| `{c.name}` | {TYPES[c.dtype]} | {c.meaning} |" for c in table.columns]
    return "\n".join(lines) + "\n"
