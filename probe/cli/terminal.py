"""What the command shows in a terminal: progress with time left, a summary table, the verdict."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from rc_probe.results.words import one_line

if TYPE_CHECKING:
    import pandas as pd

    from rc_probe.result import ProbeResult

BARS = "▁▂▃▄▅▆▇█"
SHORT = {"pretrained": "pre", "init": "init"}  # names of weights where there is little room
GAP, LEAST = 2, 8  # columns between two others; of the sparkline at least
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


def sparkline(values: list[float | None], room: int | None = None) -> str:
    """One character per layer, from 0 to the largest value but at least 1; a gap where there is none.

    room: characters at most. The first and the last layer keep their own, the others share what is left, and
    each character shows the lowest of its layers.
    """
    top = max([1.0, *(v for v in values if v is not None)])
    size = min(len(values), room or len(values))
    inner = max(size - 2, 1)
    edges = [0, *(1 + round(i * (len(values) - 2) / inner) for i in range(inner + 1)), len(values)]
    parts = [values[i:j] for i, j in pairwise(edges)] if 2 < size < len(values) else [[v] for v in values]
    lowest = [min((v for v in part if v is not None), default=None) for part in parts]
    return "".join(" " if v is None else BARS[min(int(v / top * len(BARS)), len(BARS) - 1)] for v in lowest)


def summary(result: ProbeResult, target: Path) -> None:
    """Print the table of curves, the verdict and where the files are."""
    console = Console()
    verdict = result.verdict
    rows = result.tables["residuals"]
    rows = rows[rows["metric"] == verdict["metric"]]
    if len(rows):
        console.print(_curve_table(rows, METRICS[verdict["metric"]].title, console.width))
    colour = COLOURS.get(str(verdict.get("level")), "default")
    console.print(f"[bold {colour}]{escape(one_line(verdict['sentence']))}[/]", soft_wrap=True)
    print_reasons(console, verdict)
    for found in (each for each in verdict.values() if isinstance(each, dict)):  # of single measurements
        console.print(f"[bold]{escape(one_line(found['sentence']))}[/]", soft_wrap=True)
        print_reasons(console, found)
    notes = [*result.model.get("notes", ()), *result.settings.get("notes", ())]
    for note in notes:
        console.print(f"[dim]{escape(one_line(note))}[/]", soft_wrap=True)
    console.print(f"Report: [bold]{escape(one_line(target / 'report.html'))}[/]", soft_wrap=True)


def print_reasons(console: Console, found: Mapping[str, Any]) -> None:
    """What stands behind a bold sentence, indented, so that one can read the bold ones alone."""
    for reason in found.get("reasons", ()):
        console.print(f"  {escape(one_line(reason))}", soft_wrap=True)


def _curve_table(rows: pd.DataFrame, title: str, width: int) -> Table:
    """The curves in `width` columns: the numbers are whole, the sparkline and the names take what is left."""
    last = int(rows["layer"].max())
    lines = []
    for (weights, variant), curve in rows.groupby(["weights", "variant"], sort=False):
        values = [None if math.isnan(v) else float(v) for v in curve.sort_values("layer")["mean"]]
        floor = float(curve["floor"].max())
        known = [v for v in values if v is not None]
        cells = [_cell(v, floor) for v in (values[0], min(known, default=None), values[-1])]
        lines.append((str(weights), str(variant), values, cells))
    heads = ["layer 0", "lowest", f"layer {last}"]
    wide = [max(len(head), *(len(line[3][i]) for line in lines)) for i, head in enumerate(heads)]
    left = width - sum(wide) - 5 * GAP  # for both names and the sparkline
    names = {line[0]: line[0] for line in lines}
    longest = max(len(line[1]) for line in lines)
    if max(map(len, names)) + longest + LEAST > left:
        names |= SHORT
    first = max(map(len, names.values()))
    second = max(len("variant"), min(longest, left - first - LEAST))
    room = max(3, left - first - second)
    table = Table(title=f"{title} by layer", title_justify="left", box=None, pad_edge=False)
    for name in (
        _fitting(["weights", ""], first),
        "variant",
        _fitting([f"layers 0 … {last}", f"0 … {last}", "curve"], room),
    ):
        table.add_column(name, no_wrap=True)
    for name in heads:
        table.add_column(name, justify="right", no_wrap=True)
    for weights, variant, values, cells in lines:
        table.add_row(
            escape(names[weights]), escape(one_line(_cut(variant, second))), sparkline(values, room), *cells
        )
    if any("*" in cell for line in lines for cell in line[3]):
        table.caption, table.caption_justify = "* at or below the rounding floor: noise", "left"
    return table


def _fitting(texts: list[str], room: int) -> str:
    return next((text for text in texts if len(text) <= room), "")


def _cut(text: str, room: int) -> str:
    """`text`, cut in its middle where there is no room for it."""
    if len(text) <= room:
        return text
    end = (room - 1) // 2
    return f"{text[: room - 1 - end]}…{text[len(text) - end :]}"


def _cell(value: float | None, floor: float) -> str:
    if value is None:
        return "–"
    text = f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"
    return f"{text}*" if value <= floor else text
