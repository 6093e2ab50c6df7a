"""What the command shows in a terminal: the claims, and where the files are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rc_probe.results.words import number, one_line

if TYPE_CHECKING:
    from rc_probe.experiments.result import ExperimentResult


def summary(result: ExperimentResult, target: Path) -> None:
    """Print a row for each claim that was measured, the sentence over all, and where the files are."""
    console = Console()
    table = Table(title=result.experiment["title"], title_justify="left", box=None, pad_edge=False)
    table.add_column("claim", ratio=1)
    for name in ("expected", "measured", "seeds", "holds"):
        table.add_column(name, justify="right", no_wrap=name != "measured")
    for row in result.claims.to_dict("records"):
        if pd.isna(row["holds"]):
            continue
        span = f" ({number(row['low'])} to {number(row['high'])})" if row["seeds"] > 1 else ""
        holds = "[green]yes[/]" if row["holds"] else "[red]no[/]"
        measured = f"{number(row['measured'])}{span}"
        table.add_row(escape(row["claim"]), row["expected"], measured, str(row["seeds"]), holds)
    console.print(table)
    console.print(f"[bold]{escape(one_line(result.verdict['sentence']))}[/]", soft_wrap=True)
    console.print(f"Report: [bold]{escape(one_line(target / 'report.html'))}[/]", soft_wrap=True)
