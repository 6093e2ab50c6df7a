"""One run of the command: measure with a progress bar, save, report the checks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import typer

from rc_probe.results.checks import faults, table_of
from rc_probe.results.words import one_line

from .errors import one_line_errors
from .job import Job, check_target

if TYPE_CHECKING:
    from rc_probe.processes.world import World
    from rc_probe.result import ProbeResult
    from rc_probe.results.checks import Outcome

Progress = Callable[[str, int, int], None]


@contextmanager
def in_step(
    device: str | None, check: Callable[[], None], *, quiet: bool, label: str = ""
) -> Iterator[tuple[World, Progress, Progress]]:
    """The processes that a launcher started, as one, and what shows the progress of the first: with `check` at every step, and without.

    label: before what the bar says
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's own words when a process is gone
    from rc_probe.processes.world import World

    from .terminal import progress_bar

    joined = World.join(cpu=(device or "").startswith("cpu"))
    several = one_line_errors(joined) if joined.size > 1 else nullcontext()
    with joined as world, several, progress_bar(hidden=quiet or world.rank > 0) as show:

        def report(stage: str, done: int, total: int) -> None:
            check()
            show(label + stage, done, total)

        yield world, report, show


def run(
    job: Job, check: Callable[[], None], *, quiet: bool, label: str = ""
) -> tuple[ProbeResult, list[Outcome]] | None:
    """Measure with a progress bar, and save with what the job's checks found. None in all processes but the first."""
    from .finished_runs import asked

    wanted = asked(job)
    with in_step(job.settings.device, check, quiet=quiet, label=label) as (world, report, show):
        if world.rank == 0:
            check_target(job.target)
        from rc_probe import api

        result = api.measure(
            job.model,
            job.settings,
            proved=job.checks.fit,
            progress=report,
            command=job.command,
            world=world,
            keep_interrupted=True,
        )
        result.settings["asked"] = wanted
        outcomes = job.checks.evaluate(result)
        if outcomes:
            result.tables["checks"] = table_of(outcomes)
        show(label + "writing the report", 1, 1)  # also after an interrupt: what is finished is kept
        if world.rank == 0:
            result.save(job.target)
        world.gather(None, "end")
    return (result, outcomes) if world.rank == 0 else None


def conclude(result: ProbeResult, outcomes: list[Outcome], *, quiet: bool, name: str | None = None) -> None:
    """A line for each check on standard error: standard output stays the summary, or JSON."""
    from .github import tell

    def say(line: str) -> None:
        line = one_line(line)
        typer.echo(f"{name}: {line}" if name and not line.startswith("::") else line, err=True)

    tell(name or str(result.model["id"]), result.verdict["sentence"], outcomes, say, quiet=quiet)


def tell_faults(result: ProbeResult, name: str | None = None) -> None:
    """A line on standard error for each measurement that ended in an error that nobody foresaw."""
    for measurement, why in faults(result).items():
        typer.echo(f"{name or 'rc-probe'}: {measurement} was not measured: {why}", err=True)
