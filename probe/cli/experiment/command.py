"""The command: its options, the folder, what it prints and how it ends."""

from __future__ import annotations

import os
from functools import partial
from typing import Annotated

import typer

from rc_probe.cli.errors import INTERRUPTED, fail, interrupts, one_line_errors
from rc_probe.cli.job import check_target, out_folder
from rc_probe.common_options import DEVICE_HELP
from rc_probe.data.places import check_place
from rc_probe.experiments import NAMES
from rc_probe.hooks.errors import RcProbeError
from rc_probe.options import at_least
from rc_probe.processes.launch import launched

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
_output = partial(typer.Option, rich_help_panel="Output")
DATA_HELP = (
    "Of memorize: texts as for `rc-probe MODEL`, a file or a Hub dataset. (default: bundled sentences)"
)


@app.command()
def experiment(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help=f"One of {', '.join(NAMES)}.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Print the experiments.")] = False,
    seeds: Annotated[int | None, typer.Option(help="How many seeds. (default: the experiment's own)")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes: under 3 minutes on two CPU cores.")] = False,
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    out: Annotated[str | None, _output(help="Folder for report.html, results.json, the tables and the models. (default: rc-probe-out/NAME)")] = None,
    resume: Annotated[bool, _output(help="Go on with the seeds that are finished there, with the same sizes.")] = True,
    quiet: Annotated[bool, _output("--quiet", "-q", help="No progress, no summary.")] = False,
    as_json: Annotated[bool, _output("--json", help="Print results.json on standard output.")] = False,
) -> None:  # fmt: skip
    """Train the small models of a paper's experiment, and see which of its claims hold on this machine."""
    with one_line_errors(), interrupts() as check:
        if listed:
            for each, about in NAMES.items():
                typer.echo(f"{each:12}{about}")
            return
        _refuse(name, seeds, data)
        target = out_folder(out, f"{name}-quick" if quick else str(name))
        check_target(target)
        done: list[int] = []

        from rc_probe.cli.terminal import progress_bar

        with progress_bar(hidden=quiet) as show:

            def report(stage: str, step: int, total: int) -> None:
                check()
                show(stage, step, total)

            show("loading", 0, 1)
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
            from rc_probe.experiments.runner import run

            try:
                result = run(
                    str(name), seeds=seeds, device=device, quick=quick, data=data, out=target, resume=resume,
                    progress=report, finished=done.append,
                )  # fmt: skip
            except KeyboardInterrupt:
                fail(f"interrupted. {len(done)} seeds are finished; the same command goes on", INTERRUPTED)
        if as_json:
            typer.echo((target / "results.json").read_text(encoding="utf-8").rstrip("\n"))
        elif not quiet:
            from .summary import summary

            summary(result, target)


def _refuse(name: str | None, seeds: int | None, data: str | None) -> None:
    """RcProbeError for what no training could make right, before torch is imported."""
    if name is None:
        raise RcProbeError(
            "no experiment is named", where="rc-probe experiment", todo=f"There are {', '.join(NAMES)}"
        )
    if name not in NAMES:
        from rc_probe.experiments import unknown

        raise unknown(name)
    if seeds is not None:
        at_least("--seeds", seeds, 1)
    if data is not None:
        check_place(data)
    if (launched() or 1) > 1:
        todo = "Start one process"
        raise RcProbeError("experiments are run by one process", where="rc-probe experiment", todo=todo)
