"""What the command shows in a terminal: the curves of the difference, the verdict, where the files are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rc_probe.cli.terminal import print_reasons, sparkline
from rc_probe.results.findings.difference_words import by_place
from rc_probe.results.words import number, one_line

if TYPE_CHECKING:
    from rc_probe.difference.result import DiffResult

LINES = {
    ("stream", "difference_bulk"): "relative difference",
    ("stream", "cka_bulk"): "linear CKA",
    ("block", "sensitivity_bulk"): "sensitivity of blocks",
    ("attention", "sensitivity_bulk"): "of attention",
    ("mixer", "sensitivity_bulk"): "of mixers",
    ("cross", "sensitivity_bulk"): "of cross-attention",
    ("mlp", "sensitivity_bulk"): "of MLPs",
}
ROOM = 32  # characters of a curve


def summary(result: DiffResult, target: Path) -> None:
    """Print the table, the verdict and where the files are."""
    console = Console()
    table = Table(title="Without massive tokens", title_justify="left", box=None, pad_edge=False)
    for name in ("", "first … last"):
        table.add_column(name, no_wrap=True)
    for name in ("first", "largest", "last"):
        table.add_column(name, justify="right", no_wrap=True)
    for (component, metric), name in LINES.items():
        curve = by_place(result.differences, component, metric)
        if curve:
            values = [curve[at] for at in sorted(curve)]
            top = max(values) or 1.0
            drawn = sparkline([value / top for value in values], ROOM)
            table.add_row(name, drawn, *(number(value) for value in (values[0], max(values), values[-1])))
    if table.row_count:
        console.print(table)
    console.print(f"[bold]{escape(one_line(result.verdict['sentence']))}[/]", soft_wrap=True)
    print_reasons(console, result.verdict)
    both = [note for one in (result.a, result.b) for note in one.get("notes", ())]
    for note in dict.fromkeys([*both, *result.settings["notes"]]):
        console.print(f"[dim]{escape(one_line(note))}[/]", soft_wrap=True)
    console.print(f"Report: [bold]{escape(one_line(target / 'report.html'))}[/]", soft_wrap=True)
