"""The section of the report about paths: its figures, the sentences around them, and a row for every number."""

import math
from typing import Any

import pandas as pd

from rc_probe.reports.figures.paths.effect import LEVELS, SCOPES, effect_figure
from rc_probe.reports.figures.paths.lengths import biases_of, lengths_figure
from rc_probe.reports.sections.section import Folded, Shown
from rc_probe.reports.sections.view import View
from rc_probe.reports.table_cells import Cell, Table, cell
from rc_probe.results import tables
from rc_probe.results.path_verdict import distribution, laws, percent, rows_of, series, short, told
from rc_probe.results.protocols import Result
from rc_probe.results.words import number

SHAPES = {  # of the exact parts themselves, without a task
    "norm_share": "share of the norm", "projection": "projection on the output",
    "cosine_to_output": "cosine to the output", "residual": "relative residual",
    "residual_share": "residual over that of the output",
}  # fmt: skip
SOURCES = {"tokens": "tokens", "positions": "positions", "bias": "biases"}


class Paths:
    """What paths of each length are worth and carry."""

    measurement, title = "paths", "Which paths do the work?"

    def show(self, view: View, /) -> Shown | None:
        result, sources = view.result, view.table("path_sources")
        figures = [figure for figure in (effect_figure(result), lengths_figure(result)) if figure]
        tables = [
            *_scores(result), _lengths(result), _sources(view.declared("path_sources"), sources), _architectures(result),
        ]  # fmt: skip
        folded = Folded.of("The numbers", *tables)
        if not figures and not folded:
            return None
        entry, found = told(result), view.found(self.measurement)
        notes = [f"Note: {str(note).rstrip('.')}." for note in entry.get("notes") or []]
        return Shown(
            lead="A path takes one attention head or the skip at each block. Its length is the number of heads on it.",
            finding=str(found.get("sentence") or ""),
            reasons=found.get("reasons") or [],
            figures=figures,
            after=[*_sources_sentence(sources), *_proof(entry), *notes],
            folded=folded,
        )


def _proof(entry: dict[str, Any]) -> list[str]:
    """How far the sum of all parts is from the model's output."""
    error = entry.get("euler_error")
    if not isinstance(error, int | float):
        return []
    return [
        f"The parts of all lengths and the biases add up to the model’s output, to a relative error of {number(error)}."
    ]


def _sources_sentence(frame: pd.DataFrame) -> list[str]:
    """Where the output comes from, in shares of the norm."""
    rows = frame[(frame["metric"] == "norm_share") & frame["mean"].notna()]
    parts = [f"{SOURCES.get(row['source'], row['source'])} {percent(row['mean'])}" for row in _records(rows)]
    return [f"By source, the norm comes from {', '.join(parts)}."] if parts else []


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _value(mean: float, low: float, high: float, between: str = " to ") -> Cell:
    """`0.61 (0.52 to 0.70)`, sorted by the mean."""
    one = cell(float(mean))
    known = math.isfinite(low) and math.isfinite(high)
    return Cell(f"{one.text} ({number(low, 3)}{between}{number(high, 3)})" if known else one.text, one.value)


def _sortable(count: str | int) -> str:
    """Sorts a count that may be beyond floats."""
    return f"{math.log10(int(count)):.6g}"


def _scores(result: Result) -> list[Table]:
    """For each score of the task a row per length, a column per estimator, scope and number of paths drawn."""
    frame = rows_of(result)
    frame = frame[~frame["metric"].isin(SHAPES)]
    return [
        _score(str(metric), rows, task=str(told(result).get("task") or ""))
        for metric, rows in frame.groupby("metric", sort=False)
    ]


def _score(metric: str, rows: pd.DataFrame, *, task: str) -> Table:
    by_length = rows[rows["length"].notna()]
    keys = list(
        by_length[["estimator", "drawn", "scope"]].drop_duplicates().itertuples(index=False, name=None)
    )
    order = list(by_length["estimator"].unique())
    keys.sort(
        key=lambda key: (order.index(key[0]), 0 if math.isnan(key[1]) else key[1])
    )  # stable: scopes stay
    columns = {}
    for estimator, drawn, scope in keys:
        these = by_length[(by_length["estimator"] == estimator) & (by_length["scope"] == scope)]
        columns[estimator, drawn, scope] = these[
            these["drawn"].isna() if math.isnan(drawn) else these["drawn"] == drawn
        ].set_index("length")
    lines = []
    for length in sorted(by_length["length"].unique()):
        found = [column.loc[length] if length in column.index else None for column in columns.values()]
        cells = [cell(None) if one is None else _value(one["mean"], one["low"], one["high"]) for one in found]
        lines.append([cell(int(length)), *cells])
    for row in _records(rows[rows["length"].isna()]):
        name = LEVELS.get(row["scope"], str(row["scope"]))
        value = _value(row["mean"], row["low"], row["high"])
        lines.append([Cell(name, "1e9"), value, *[cell(None)] * (len(columns) - 1)])
    headings = ["length k", *(SCOPES.get(scope, scope) for _, _, scope in columns)]
    groups: list[tuple[str, int]] = []
    for estimator, drawn, _ in columns:
        text = estimator if math.isnan(drawn) else f"{estimator}, {drawn:.0f} drawn"
        before = groups.pop() if groups and groups[-1][0] == text else (text, 0)
        groups.append((text, before[1] + 1))
    title = f"{metric.replace('_', ' ').capitalize()} by length, with 95 % intervals"
    return Table(f"paths-{metric}", f"{title} ({task})" if task else title, headings, lines, groups)


def _lengths(result: Result) -> Table | None:
    """How many paths each length has, and what they add to the output."""
    counts = distribution(result)
    found = {name: one for metric, name in SHAPES.items() if (one := series(result, metric))}
    numbers = {int(row["length"]): row for row in _records(counts)}
    lengths = sorted({*numbers, *(k for one in found.values() for k in one.lengths)})
    if not lengths:
        return None
    headings = ["length", *(["paths", "share of all paths"] if numbers else []), *found]
    rows = []
    for length in lengths:
        row = [cell(length)]
        if numbers:
            have = numbers.get(length)
            count = Cell(short(have["count"]), _sortable(have["count"])) if have else cell(None)
            row += [count, cell(float(have["share"])) if have else cell(None)]
        for one in found.values():
            place = one.lengths.index(length) if length in one.lengths else None
            row.append(
                cell(None) if place is None else _value(one.means[place], one.lows[place], one.highs[place])
            )
        rows.append(row)
    if norm := found.get(SHAPES["norm_share"]):
        name = SHAPES["norm_share"]
        rest = [cell(biases_of(norm)) if heading == name else cell(None) for heading in headings[1:]]
        rows.append([Cell("biases", "1e9"), *rest])
    return Table("paths-lengths", "Each length alone, exact, with 95 % intervals", headings, rows)


def _sources(declared: tables.Table, frame: pd.DataFrame) -> Table | None:
    frame = frame[frame["mean"].notna()]
    if frame.empty:
        return None
    names = {str(m): SHAPES.get(str(m), str(m)) for m in frame["metric"].unique()}
    rows = []
    for source, group in frame.groupby("source", sort=False):
        values = {r["metric"]: _value(r["mean"], r["low"], r["high"]) for r in _records(group)}
        rows.append(
            [Cell(SOURCES.get(str(source), str(source))), *(values.get(m, cell(None)) for m in names)]
        )
    return Table("paths-sources", declared.title, ["source", *names.values()], rows)


def _architectures(result: Result) -> Table | None:
    found = laws(result)
    if not found:
        return None
    rows = []
    for model, law in found.items():
        lengths, shares = law["length"], law["share"]
        total = sum(int(count) for count in law["count"])
        rows.append([
            cell(model), cell(int(lengths.max())), Cell(short(total), _sortable(total)),
            cell(float((lengths * shares).sum())), cell(int(lengths.iloc[shares.argmax()])), cell(float(shares.max())),
        ])  # fmt: skip
    headings = ["model", "longest", "paths", "mean length", "commonest length", "its share"]
    return Table("paths-architectures", "Path lengths of well-known architectures", headings, rows)
