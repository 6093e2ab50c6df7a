"""Several runs in one go, then their comparison: finished ones are skipped, a failing one does not stop the others."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rc_probe.data.read_once import reading_once
from rc_probe.hooks.errors import RcProbeError, out_of_memory
from rc_probe.processes.launch import launched
from rc_probe.results.checks import FAILED, PASSED, UNKNOWN, exit_code, table_of

from .errors import INTERRUPTED, fail
from .finished_runs import finished, interrupted
from .job import Job
from .one_run import conclude, run, tell_faults

if TYPE_CHECKING:
    from rc_probe.result import ProbeResult
    from rc_probe.results.checks import Outcome
    from rc_probe.results.protocols import Failure, Run


@dataclass(frozen=True)
class Planned:
    """A run to be made. name: of its curve and in lines; step: of the training, where it is a checkpoint."""

    name: str
    job: Job
    step: int | None = None


@dataclass(frozen=True)
class ManyRuns:
    """All runs of one command. title: of their comparison, which goes to `target`."""

    title: str
    planned: Sequence[Planned]
    target: Path
    command: str
    resume: bool = True
    quiet: bool = False
    as_json: bool = False

    def make(self, check: Callable[[], None]) -> int:
        """Make what is missing, compare all, tell it. Exit code: 2 if a run could not be made, 1 if a check failed."""
        refuse_processes(launched())
        from rc_probe.comparison import Comparison
        from rc_probe.results.protocols import Failure, Run

        runs: list[Run] = []
        failures: list[Failure] = []
        codes = [PASSED]
        with reading_once():
            for place, each in enumerate(self.planned, 1):
                label = f"[{place}/{len(self.planned)}] {each.name}"
                try:
                    result, outcomes = self._one(each, label, check)
                except KeyboardInterrupt:
                    fail(
                        f"interrupted. {len(runs)} of {len(self.planned)} runs are finished; the same command goes on",
                        INTERRUPTED,
                    )
                except Exception as error:  # whatever one model does wrong, the others have their turn
                    line = _line(error)
                    failures.append(Failure(each.name, line))
                    typer.echo(f"rc-probe: {label}: {line}", err=True)
                    continue
                runs.append(Run(each.name, result, each.step))
                if outcomes:
                    conclude(result, outcomes, quiet=self.quiet, name=each.name)
                tell_faults(result, each.name)
                codes.append(exit_code(outcomes, result))
        if not runs:
            fail(f"none of {len(self.planned)} runs could be made")
        comparison = Comparison(runs, failures, self.title, self.command)
        comparison.save(self.target)
        from .compare import show

        show(comparison, self.target, quiet=self.quiet, as_json=self.as_json)
        return UNKNOWN if failures or UNKNOWN in codes else FAILED if FAILED in codes else PASSED

    def _one(self, each: Planned, label: str, check: Callable[[], None]) -> tuple[ProbeResult, list[Outcome]]:
        """Its result, made now or before, and what its checks found in it."""
        found = finished(each.job) if self.resume else None
        if found is None:
            gc.collect()  # the model before this one
            made = run(each.job, check, quiet=self.quiet, label=f"{label}: ")
            assert made is not None  # one process alone
            result, outcomes = made
            if interrupted(result):
                raise KeyboardInterrupt
            self._say(f"{label}: measured")
            return result, outcomes
        self._say(f"{label}: there already, with the same settings")
        outcomes = each.job.checks.evaluate(found)
        if outcomes:
            found.tables["checks"] = table_of(outcomes)
            found.save(each.job.target)
        return found, outcomes

    def _say(self, line: str) -> None:
        if not self.quiet:
            typer.echo(line, err=True)


def refuse_processes(processes: int | None) -> None:
    """RcProbeError if several processes are wanted, or are there."""
    if (processes or 1) > 1:
        what = "several processes share the samples of one run, and these are several runs"
        raise RcProbeError(what, where="--num-processes", todo="Leave it out, or measure one model at a time")


def _line(error: Exception) -> str:
    if isinstance(error, RcProbeError):
        return str(error)
    if out_of_memory(error):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def given(context: Any) -> list[str]:
    """Of a typer context: names of the options that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
