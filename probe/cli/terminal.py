"""What the command shows in a terminal: progress with time left, a summary table, the verdict."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from rc_probe.registry import METRICS

if TYPE_CHECKING:
    import pandas as pd

    from rc_probe.result import ProbeResult

BARS = "▁▂▃▄▅▆▇█"
COLOURS = {"healthy": "green", "watch": "yellow", "collapsed": "red"}


@contextmanager
def progress_bar(*, hidden: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, if that is a terminal; yields report(stage, done, total).

    Hidden, the bars that libraries draw while files come down are hidden, too.
    """
    console = Console(stderr=True)
    hidden = hidden or not console.is_terminal
    count = TextColumn("{task.fields[count]}")
    bar = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip
    task = bar.add_task("starting", total=None, count="")
    with ExitStack() as stack:
        if hidden:
            stack.enter_context(no_download_bars())

        def report(stage: str, done: int, total: int) -> None:
            if hidden:
                return
            if stage.endswith(
                "loading"
            ):  # downloads draw bars of their own, and two would fight for the line
                console.print(f"{stage} …", end="\r")
                return
            # Before the first pass there is nothing to count.
            bar.update(task, description=stage, completed=done, total=total if done else None,
                       count=f"{done}/{total}" if done else "")  # fmt: skip
            if not bar.live.is_started:
                stack.enter_context(bar)

        yield report


@contextmanager
def no_download_bars() -> Iterator[None]:
    """The bars of the Hub and of `datasets` off; then as before."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    name = "HF_DATASETS_DISABLE_PROGRESS_BARS"  # read when `datasets` is imported, which few runs need
    before, off = os.environ.get(name), are_progress_bars_disabled()
    os.environ[name] = "1"
    if not off:
        disable_progress_bars()
    try:
        yield
    finally:
        if not off:
            enable_progress_bars()
        if before is None:
            os.environ.pop(name)
        else:
            os.environ[name] = before


def sparkline(values: list[float | None]) -> str:
    """One character per layer, from 0 to the largest value but at least 1; a gap where there is none."""
    top = max([1.0, *(v for v in values if v is not None)])
    return "".join(" " if v is None else BARS[min(int(v / top * len(BARS)), len(BARS) - 1)] for v in values)


def summary(result: ProbeResult, target: Path) -> None:
    """Print the table of curves, the verdict and where the files are."""
    console = Console()
    verdict = result.verdict
    rows = result.tables["residuals"]
    rows = rows[rows["metric"] == verdict["metric"]]
    if len(rows):
        console.print(_curve_table(rows, METRICS[verdict["metric"]].title))
    colour = COLOURS.get(str(verdict.get("level")), "default")
    console.print(f"[bold {colour}]{escape(str(verdict['sentence']))}[/]", soft_wrap=True)
    for reason in verdict.get("reasons", ()):
        console.print(escape(str(reason)), soft_wrap=True)
    for found in (each for each in verdict.values() if isinstance(each, dict)):  # of single measurements
        console.print(f"[bold]{escape(str(found['sentence']))}[/]", soft_wrap=True)
        for reason in found.get("reasons", ()):
            console.print(escape(str(reason)), soft_wrap=True)
    notes = [*result.model.get("notes", ()), *result.settings.get("notes", ())]
    for note in notes:
        console.print(f"[dim]{escape(str(note))}[/]", soft_wrap=True)
    console.print(f"Report: [bold]{escape(str(target / 'report.html'))}[/]", soft_wrap=True)


def _curve_table(rows: pd.DataFrame, title: str) -> Table:
    last = int(rows["layer"].max())
    table = Table(title=f"{title} by layer", title_justify="left", box=None, pad_edge=False)
    for name in ("weights", "variant", f"layers 0 … {last}"):
        table.add_column(name, no_wrap=True)
    for name in ("layer 0", "lowest", f"layer {last}"):
        table.add_column(name, justify="right", no_wrap=True)
    floored = False
    for (weights, variant), curve in rows.groupby(["weights", "variant"], sort=False):
        values = [None if math.isnan(v) else float(v) for v in curve.sort_values("layer")["mean"]]
        floor = float(curve["floor"].max())
        known = [v for v in values if v is not None]
        cells = [_cell(v, floor) for v in (values[0], min(known, default=None), values[-1])]
        floored = floored or any("*" in c for c in cells)
        table.add_row(escape(str(weights)), escape(str(variant)), sparkline(values), *cells)
    if floored:
        table.caption, table.caption_justify = "* at or below the rounding floor: noise", "left"
    return table


def _cell(value: float | None, floor: float) -> str:
    if value is None:
        return "–"
    text = f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"
    return f"{text}*" if value <= floor else text
