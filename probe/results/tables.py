"""The tables of results: their columns, declared once. Frames, CSV, headings, tooltips and docs/tables.md come from here.

python -m rc_probe.results.tables > docs/tables.md
"""

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


_WEIGHTS = Column("weights", "str", "`pretrained`, or `init`: the same config, freshly initialised")
_VARIANT = Column(
    "variant", "str", "`transformer` (the whole model), `SAN`, `SAN+MLP`, `SAN+skip`, or an ablation"
)
_LAYER = Column("layer", "int64", "a point of the stream: 0 is what enters block 1, l what leaves block l")
_METRIC = Column("metric", "str", "what the number is")
_STREAM = (
    _LAYER,
    _METRIC,
    Column("mean", "float64", "mean over samples"),
    Column("std", "float64", "standard deviation over samples (ddof 1); empty for one sample"),
    Column("count", "int64", "how many samples"),
    Column("floor", "float64", "rounding floor: up to here the number is noise"),
)
_SPREAD = (
    Column("std", "float64", "standard deviation (ddof 1); empty for one value"),
    Column("low", "float64", "lower end of the 95 % interval of the mean"),
    Column("high", "float64", "upper end of it"),
)
_BASELINE = (
    Column("baseline", "float64", "the same of the whole model"),
    Column("change", "float64", "value − baseline"),
)

# Of one run.
TABLES = _named(
    Table("residuals", "Every metric at every layer, of every variant", (_WEIGHTS, _VARIANT, *_STREAM)),
    Table("ablations", "Every ablation and metric at the last layer", (
        Column("component", "str", "what is off, or the name of a variant of the paper"),
        Column("layer", "str", "in which blocks, counted from 1"),
        Column("head", "str", "which heads, counted from 1; empty for all else"),
        _METRIC,
        Column("value", "float64", "with the part off, mean over samples"),
        *_BASELINE,
    )),
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
    Table("recursion", "The recursion by layer", (
        _WEIGHTS, _LAYER,
        Column("residual", "float64", "relative residual of pure attention, computed without cancellation"),
        Column("residual_direct", "float64", "the same as the model's own arithmetic has it", "plain arithmetic"),
        Column("ratio_cubed", "float64", "residual divided by the cube of the layer before", "r / previous r³"),
    )),
    Table("bounds", "The bound of theorem 2.2 by layer", (
        _WEIGHTS,
        Column("layer", "int64", "number of the attention layer, from 1"),
        Column("heads", "int64", "H, how many heads it has"),
        Column("d_qk", "int64", "d, the width of a query or a key", "d per head"),
        Column("beta", "float64", "largest ‖W_Q W_Kᵀ‖₁ ‖W_V W_O‖₁,∞ of its heads", "β"),
        Column("gamma", "float64", "the theorem's γ, as measured", "γ"),
        Column("coefficient", "float64", "what the cube of the residual is multiplied by", "4γβH/√d"),
        Column("spread", "float64", "how far the scores of a row spread at most; the theorem allows 1.256", "max D"),
        Column("residual_in", "float64", "‖res X‖₁,∞ of the tokens that enter the layer", "residual in"),
        Column("residual_out", "float64", "‖res X‖₁,∞ of what the layer gives", "residual out"),
        Column("bound_out", "float64", "what the theorem bounds residual_out by; empty beyond floats", "bound"),
        Column("log10_bound_unrolled", "float64", "log₁₀ of the bound from layer 1 to here; empty beyond floats",
               "log₁₀ unrolled bound"),
        Column("vacuous", "bool", "whether the bound says nothing"),
        Column("reason", "str", "why it says nothing", "why vacuous"),
    )),
    Table("init_seeds", "Further initialisations", (
        Column("seed", "int64", "of the fresh weights"), _VARIANT, _LAYER, _METRIC,
        Column("mean", "float64", "mean over samples"),
    )),
    Table("paths", "What paths of each length do", (
        Column("length", "int64", "heads on the path; empty where a row is about no length"),
        Column("count", "str", "how many paths have this length, in decimal: it may be beyond 2⁶³"),
        Column("estimator", "str", "`exact`, `sampled`, `live`; `full` and `baseline` of the reference rows"),
        Column("drawn", "int64", "paths drawn at each length for an estimate; empty where none are"),
        Column("scope", "str", "`alone`, `up_to` or `all_but` this length; `none`: biases without a path; `full`, `baseline`"),
        _METRIC,
        Column("mean", "float64", "over samples where exact, over estimates else"),
        *_SPREAD,
    )),
    Table("path_sources", "By source, all lengths together", (
        Column("source", "str", "`tokens`, `positions` or `bias`"), _METRIC,
        Column("mean", "float64", "mean over the samples of the first batch"), *_SPREAD,
    )),
    Table("path_counts", "How many paths of each length there are, beside well-known architectures", (
        Column("model", "str", "the model at hand, then architectures by name"),
        Column("length", "int64", "heads on the path"),
        Column("count", "str", "how many paths have this length, in decimal: it may be beyond 2⁶³"),
        Column("share", "float64", "their share of all paths"),
    )),
    Table("chains", "Products of attention patterns by length", (
        Column("length", "int64", "patterns in the product"), _METRIC,
        Column("mean", "float64", "mean over paths and samples"),
        Column("std", "float64", "standard deviation over them (ddof 1)"),
        Column("median", "float64", "median over them"),
        Column("low", "float64", "lower quartile", "lower quartile"),
        Column("high", "float64", "upper quartile", "upper quartile"),
        Column("count", "int64", "how many products"),
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
_RUN, _STEP = Column("run", "str", "name of the run"), Column("step", "int64", "of the training")
COMPARED = _named(
    Table("runs", "One row per run", (
        _RUN, _STEP,
        Column("first", "float64", "relative residual at layer 0", "layer 0"),
        Column("first_change", "float64", "first − that of the first run", "change"),
        Column("last", "float64", "at the last layer", "last layer"),
        Column("last_change", "float64", "last − that of the first run", "change"),
        Column("lowest", "float64", "lowest after a block"),
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
    Table("residuals", "The tables residuals of the runs", (
        _RUN, _STEP, *TABLES["residuals"].columns, Column("depth", "float64", "layer / blocks, 0 to 1"),
    )),
    Table("changes", "Metrics of the whole model against those of the first run", (
        _RUN, _METRIC, _LAYER,
        Column("value", "float64", "mean over samples"),
        Column("baseline", "float64", "the same of the first run"),
        Column("change", "float64", "value − baseline"),
        Column("floor", "float64", "rounding floor of both together: up to here the change is noise"),
    )),
    Table("ablations", "The tables ablations of the runs", (_RUN, _STEP, *TABLES["ablations"].columns)),
    Table("differences", "What was not measured alike", (
        Column("setting", "str", "what differs"), _RUN, Column("value", "str", "what it was in this run"),
    )),
    Table("failures", "Runs that failed", (
        Column("name", "str", "name of the run", "run"), Column("error", "str", "why there is no result", "why"),
    )),
)  # fmt: skip

# What `frame()` and `lm-eval` give, in no result.
FRAMES = _named(
    Table("attach", "Every metric at every layer", _STREAM),
    Table("monitor", "Every metric at every layer, at every measurement", (_STEP, *_STREAM)),
    Table("lm_eval", "Scores of the harness", (
        Column("task", "str", "name of the task"),
        Column("metric", "str", "of the harness, with its filter after a comma"),
        Column("ablation", "str", "what is off; `none` first"),
        Column("value", "float64", "the score"),
        Column("stderr", "float64", "its standard error; empty where the harness gives none"),
        *_BASELINE,
    )),
)  # fmt: skip


def page() -> str:
    """docs/tables.md."""
    lines = [
        "# The tables", "",
        "Written by `python -m rc_probe.results.tables`. Every table of `results.json` is also a CSV file; an empty "
        "cell is a number that is not known.",
    ]  # fmt: skip
    parts = {"A run": TABLES, "A comparison": COMPARED, "Frames from Python, and `rc-probe lm-eval`": FRAMES}
    for heading, tables in parts.items():
        lines += ["", f"## {heading}"]
        for table in tables.values():
            lines += [
                "",
                f"### {table.name}",
                "",
                f"{table.title}.",
                "",
                "| column | type | meaning |",
                "|---|---|---|",
            ]
            lines += [f"| `{c.name}` | {TYPES[c.dtype]} | {c.meaning} |" for c in table.columns]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
