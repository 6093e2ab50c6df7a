"""The report of several runs: one HTML file, made from a comparison."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from rc_probe.reports.figures.comparison import curves_figure, training_figures
from rc_probe.reports.table_cells import Cell, Table, cell, whole_table
from rc_probe.results.protocols import Compared
from rc_probe.results.tables import COMPARED
from rc_probe.results.words import many, number

from .run import downloads
from .template import fill

Row = Mapping[Hashable, Any]

SHOWN = ("run", "step", "first", "lowest", "lowest_layer", "last", "level", "blocks", "dtype", "tokens", "model", "revision",
         "parameters")  # fmt: skip


def headline(comparison: Compared) -> tuple[str, list[str]]:
    """The finding in one sentence with its number first, and further sentences."""
    rows = [row for row in comparison.tables["runs"].to_dict("records") if number(row["last"]) != "–"]
    if not rows:
        return "No relative residual of a whole model was measured.", []
    low, high = (choose(rows, key=lambda row: row["last"]) for choose in (min, max))
    if comparison.training:
        return _over_training(rows, low), [_levels(rows)]
    if len(rows) == 1:
        return f"{number(low['last'])} relative residual at the last layer of {low['run']}.", []
    sentence = (
        f"{number(low['last'])} to {number(high['last'])} relative residual at the last layer: lowest in "
        f"{low['run']}, highest in {high['run']}."
    )
    return sentence, [_levels(rows)]


def _over_training(rows: Sequence[Row], low: Row) -> str:
    start, end = rows[0], rows[-1]
    sentence = (
        f"{number(end['last'])} relative residual at the last layer after step {end['step']:,}; it was "
        f"{number(start['last'])} at step {start['step']:,}"
    )
    inside = low["step"] not in (start["step"], end["step"])
    return sentence + (f", lowest {number(low['last'])} at step {low['step']:,}." if inside else ".")


def _levels(rows: Sequence[Row]) -> str:
    count = Counter(row["level"] if isinstance(row["level"], str) else "none" for row in rows)
    return "Levels: " + ", ".join(f"{times} {level}" for level, times in count.items()) + "."


def _runs_table(frame: pd.DataFrame) -> Table | None:
    wanted = [column for column in SHOWN if column in frame and frame[column].notna().any()]
    for other, one in (("model", "run"), ("revision", "run")):  # said twice
        if other in wanted and one in wanted and frame[other].astype(str).equals(frame[one].astype(str)):
            wanted.remove(other)
    return whole_table(COMPARED["runs"], frame[wanted])


def _differences_table(comparison: Compared) -> Table | None:
    """One row per run, one column per setting."""
    found = comparison.differences
    if not found:
        return None
    rows = [
        [Cell(run.name), *(Cell(values[run.name]) for values in found.values())] for run in comparison.runs
    ]
    return Table("differences", "What differs", ["run", *found], rows)


def _ablations_table(comparison: Compared) -> Table | None:
    wide = comparison.common_ablations()
    if wide.empty:
        return None
    last = comparison.tables["runs"].set_index("run")["last"]
    rows = [
        [Cell(str(name)), cell(last[name]), *(cell(float(value)) for value in values)]
        for name, values in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    return Table("ablations", "Residual at the last layer", ["run", "whole", *map(str, wide)], rows)


def _strip(comparison: Compared) -> list[str]:
    depths = sorted(
        {int(run.result.model["blocks"]) for run in comparison.runs if run.result.model.get("blocks")}
    )
    failed = len(comparison.failures)
    parts = [
        many(len(comparison.runs), "runs"),
        f"{many(failed, 'runs')} not measured" if failed else "",
        f"{' or '.join(map(str, depths))} layers" if depths else "",
        "measured alike" if not comparison.differences else "measured differently",
    ]
    return [part for part in parts if part]


def render(comparison: Compared) -> str:
    """The page as text: the same runs give the same bytes."""
    sentence, reasons = headline(comparison)
    shown = sentence.split(" ")[0] if sentence[0].isdigit() else ""
    figures = training_figures(comparison) if comparison.training else [curves_figure(comparison)]
    tables: dict[str, Any] = {
        "runs_table": _runs_table(comparison.tables["runs"]),
        "ablations_table": _ablations_table(comparison),
        "differences_table": _differences_table(comparison),
        "failures_table": whole_table(COMPARED["failures"], comparison.tables.get("failures")),
    }
    return fill(
        "comparison.html",
        name=comparison.title,
        strip=_strip(comparison),
        shown=shown,
        rest=sentence.removeprefix(shown).strip(),
        reasons=reasons,
        figures=[figure for figure in figures if figure],
        command=comparison.command,
        downloads=downloads(comparison),
        **tables,
    )
