"""`rc-probe compare RUN RUN …`: several results in one report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rc_probe.registry import WHOLE

from .errors import interrupts, one_line_errors
from .job import check_target, out_folder

if TYPE_CHECKING:
    from rc_probe.comparison import Comparison

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
OUT = Path("rc-probe-out") / "comparison"


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN …", help="Folders that rc-probe wrote, or their results.json.")],
    out: Annotated[str | None, typer.Option(help=f"Folder for report.html, results.json and the tables. (default: {OUT})")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No summary.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json on standard output.")] = False,
) -> None:  # fmt: skip
    """Compare results: models, revisions, seeds, quantised or pruned versions, in one report and one table."""
    with one_line_errors(), interrupts():
        target = out_folder(out, OUT.name)
        check_target(target)
        for run in runs:
            if target.resolve() in (Path(run).resolve(), Path(run).resolve().parent):
                from rc_probe.hooks.errors import RcProbeError

                raise RcProbeError(
                    f"it would replace the run {run}", where=f"--out {target}", todo="Give another folder"
                )
        from rc_probe.comparison import compare as made_of

        comparison = made_of(*runs, command=shlex.join(["rc-probe", *sys.argv[1:]]))
        comparison.save(target)
        show(comparison, target, quiet=quiet, as_json=as_json)


def show(comparison: Comparison, target: Path, *, quiet: bool, as_json: bool) -> None:
    """The table of runs, what differs, and where the report is; or the JSON."""
    if as_json:
        typer.echo((target / "results.json").read_text(encoding="utf-8").rstrip("\n"))
        return
    if quiet:
        return
    from rich.console import Console
    from rich.markup import escape

    from rc_probe.reports.pages.comparison import headline
    from rc_probe.results.words import one_line

    console = Console()
    console.print(_table(comparison))
    sentence, _ = headline(comparison)
    console.print(f"[bold]{escape(one_line(sentence))}[/]", soft_wrap=True)
    for what, values in comparison.differences.items():
        said = ", ".join(f"{value} in {run}" for run, value in values.items())
        console.print(
            f"[yellow]Not like for like: {escape(what)} is {escape(one_line(said))}.[/]", soft_wrap=True
        )
    for failure in comparison.failures:
        console.print(
            f"[red]Not measured: {escape(one_line(failure.name))}: {escape(one_line(failure.error))}[/]",
            soft_wrap=True,
        )
    console.print(f"Report: [bold]{escape(str(target / 'report.html'))}[/]", soft_wrap=True)


def _table(comparison: Comparison) -> object:
    """One row per run, its residual drawn by layer."""
    from rich.markup import escape
    from rich.table import Table

    from rc_probe.results.curves import curves
    from rc_probe.results.words import number, one_line

    from .terminal import COLOURS, sparkline

    table = Table(title="Relative residual by layer", title_justify="left", box=None, pad_edge=False)
    for name in ("run", "layer 0 … last"):
        table.add_column(name, no_wrap=True)
    for name in ("layer 0", "lowest", "last"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("level")
    rows = {row["run"]: row for row in comparison.tables["runs"].to_dict("records")}
    for run in comparison.runs:
        row, curve = rows[run.name], curves(run.result, comparison.metric).get(("pretrained", WHOLE))
        cells = [number(row[key]) for key in ("first", "lowest", "last")]
        level = row["level"] if isinstance(row["level"], str) else "–"
        drawn = sparkline(list(curve.means)) if curve else ""
        table.add_row(
            escape(one_line(run.name)), drawn, *cells, f"[{COLOURS.get(level, 'default')}]{level}[/]"
        )
    return table
