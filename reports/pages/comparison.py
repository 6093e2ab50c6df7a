"""The report of several runs: one HTML file, made from a comparison."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from rc_probe.reports.sections.compared import COMPARED_SECTIONS
from rc_probe.reports.sections.section import shown
from rc_probe.reports.sections.view import ComparedView
from rc_probe.results.protocols import Compared
from rc_probe.results.words import many, number

from .run import downloads
from .template import fill

Row = Mapping[Hashable, Any]


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
    return fill(
        "summary.html",
        kind="comparison",
        name=comparison.title,
        strip=_strip(comparison),
        sentence=sentence,
        reasons=reasons,
        sections=shown(COMPARED_SECTIONS, ComparedView(comparison)),
        command=comparison.command,
        downloads=downloads(comparison),
    )
