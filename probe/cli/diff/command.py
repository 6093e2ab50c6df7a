"""The command: its options, the folder, what it prints and how it ends."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rc_probe.cli.errors import interrupts, one_line_errors
from rc_probe.cli.finished_runs import free_folder, settings_in
from rc_probe.cli.generated import chosen_options, with_options
from rc_probe.cli.job import check_target, folder_name, out_folder
from rc_probe.cli.one_run import in_step
from rc_probe.common_options import MODEL
from rc_probe.data.places import check_place
from rc_probe.difference.checks import DiffChecks
from rc_probe.difference.options import DiffOptions
from rc_probe.processes.launch import start_or_join
from rc_probe.results.checks import Outcome, exit_code, table_of
from rc_probe.results.words import one_line

if TYPE_CHECKING:
    from rc_probe.difference.result import DiffResult

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
NAMES = "A Hub id, a folder (also of an adapter), a .gguf file, 'demo' or 'demo-decoder'."
FAIL_IF_HELP = (
    "End with exit code 1 if this holds: 'difference@max>0.05', 'sensitivity@max:mlp>0.02', 'agreement<0.95'. "
    "METRIC[@WHERE][:COMPONENT], then < <= > >= and a number, in quotes. Repeat for more."
)
PROCESSES_HELP = "Share the samples among N processes of this machine, one for each GPU; each holds both models. (default: 1)"
_model, _checks, _output = (
    partial(typer.Option, rich_help_panel=panel) for panel in (MODEL, "Checks", "Output")
)


@app.command()
@with_options(DiffOptions)
def diff(
    model: Annotated[str, typer.Argument(metavar="A", help=f"What the other is compared with. {NAMES}")],
    model_b: Annotated[str, typer.Argument(metavar="B", help="The second model; it may be the same name with options of its own.")],
    num_processes: Annotated[int | None, _model(help=PROCESSES_HELP, min=1)] = None,
    fail_if: Annotated[list[str] | None, _checks(help=FAIL_IF_HELP)] = None,
    out: Annotated[str | None, _output(help="Folder for report.html, results.json and the tables. (default: rc-probe-out/A-and-B)")] = None,
    quiet: Annotated[bool, _output("--quiet", "-q", help="No progress, no summary.")] = False,
    as_json: Annotated[bool, _output("--json", help="Print results.json on standard output.")] = False,
    **chosen: Any,
) -> None:  # fmt: skip
    """How far model B is from model A on your data: by layer, by block and branch, in what it predicts.

    For a finetuned, quantised, merged or pruned version beside its original, an adapter on and off, two dtypes, two attention
    implementations. Both models are in memory at once.
    """
    with one_line_errors(), interrupts() as check:
        settings: DiffOptions = chosen_options(DiffOptions, chosen)  # type: ignore[assignment]
        settings.check()
        check_place(settings.data)
        checks = DiffChecks.of(fail_if or ())
        checks.plan(settings)
        command = shlex.join(settings.words_of_two(model, model_b))
        target = out_folder(out, f"{folder_name(model)}-and-{folder_name(model_b)}")
        target = (
            target
            if out
            else free_folder(target, lambda place: settings_in(place).get("command") in (None, command))
        )
        if num_processes is not None:
            start_or_join(num_processes, settings)
        done = _run(model, model_b, settings, checks, target, check, command=command, quiet=quiet)
        if done is None:
            return
        result, outcomes = done
        if as_json:
            typer.echo((target / "results.json").read_text(encoding="utf-8").rstrip("\n"))
        elif not quiet:
            from .summary import summary

            summary(result, target)
        if outcomes:
            _conclude(result, outcomes, quiet=quiet)
        raise SystemExit(exit_code(outcomes, result))


def _run(
    a: str, b: str, settings: DiffOptions, checks: DiffChecks, target: Path, check: Callable[[], None], *, command: str,
    quiet: bool,
) -> tuple[DiffResult, list[Outcome]] | None:  # fmt: skip
    """Measure with a progress bar, and save with what the checks found. None in all processes but the first."""
    with in_step(settings.device, check, quiet=quiet) as (world, report, show):
        if world.rank == 0:
            check_target(target)
        from rc_probe.difference.diff import difference

        result = difference(a, b, settings, progress=report, command=command, fit=checks.fit, world=world)
        outcomes = checks.evaluate(result)
        if outcomes:
            result.tables["checks"] = table_of(outcomes)
        show("writing the report", 1, 1)
        if world.rank == 0:
            result.save(target)
        world.gather(None, "end")
    return (result, outcomes) if world.rank == 0 else None


def _conclude(result: DiffResult, outcomes: list[Outcome], *, quiet: bool) -> None:
    """A line for each check on standard error: standard output stays the summary, or JSON."""
    from rc_probe.cli.github import tell

    name = f"{result.b['name']} beside {result.a['name']}"
    tell(
        name,
        result.verdict["sentence"],
        outcomes,
        lambda line: typer.echo(one_line(line), err=True),
        quiet=quiet,
    )
