"""The command `rc-probe MODEL`. torch is imported only once there is something to measure."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rc_probe import __version__
from rc_probe.integrations.trackers import check_trackers, log_result
from rc_probe.models.checkpoints import Checkpoint, checkpoints
from rc_probe.processes.launch import launched, start_or_join
from rc_probe.results.checks import exit_code
from rc_probe.settings import Settings

from .errors import interrupts, one_line_errors
from .help_texts import (
    ABLATE_HELP,
    BASELINE_HELP,
    BLOCKS_HELP,
    DATA_HELP,
    EXAMPLES,
    FAIL_IF_HELP,
    LABEL_HELP,
    LOG_HELP,
    MAP_HELP,
    MAX_DROP_HELP,
    OUT_HELP,
    PATHS_HELP,
    PROCESSES_HELP,
    REVISIONS_HELP,
    STACK_HELP,
)
from .job import Job, folder_name
from .one_run import conclude, run

if TYPE_CHECKING:
    pass

DEFAULT = Settings()
COMMANDS = {  # besides the main job
    "architectures": "rc_probe.cli.architectures",
    "compare": "rc_probe.cli.compare",
    "lm-eval": "rc_probe.cli.lm_eval",
    "sweep": "rc_probe.cli.sweep",
}
app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rc-probe {__version__}")
        raise typer.Exit


_model, _data, _measure, _paths, _checks, _output = (
    partial(typer.Option, rich_help_panel=panel)  # an option in a panel of --help
    for panel in ("The model", "The data", "What is measured", "Paths", "Checks", "Output")
)


@app.command(epilog=EXAMPLES)
def measure(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A Hub id, a folder, or 'demo' (the packaged all-MiniLM-L6-v2).")],
    revision: Annotated[str | None, _model(help="Branch, tag or commit of a Hub model.")] = DEFAULT.revision,
    revisions: Annotated[str | None, _model(help=REVISIONS_HELP)] = None,
    dtype: Annotated[str, _model(help="float32, float64, bfloat16, float16, or auto.")] = DEFAULT.dtype,
    device: Annotated[str | None, _model(help="cpu, cuda, cuda:1 … (default: cuda if there is one)")] = DEFAULT.device,
    device_map: Annotated[str | None, _model(help=MAP_HELP)] = DEFAULT.device_map,
    offload_folder: Annotated[str | None, _model(help="For what the device map puts on disk.")] = DEFAULT.offload_folder,
    num_processes: Annotated[int | None, _model(help=PROCESSES_HELP, min=1)] = None,
    allow_pickle: Annotated[
        bool, _model("--allow-pickle", help="Also load pickled weights, which can run code.")
    ] = DEFAULT.allow_pickle,
    trust_remote_code: Annotated[
        bool, _model("--trust-remote-code", help="Run the model's own code.")
    ] = DEFAULT.trust_remote_code,
    stack: Annotated[str | None, _model(help=STACK_HELP)] = DEFAULT.stack,
    blocks: Annotated[str | None, _model(help=BLOCKS_HELP)] = DEFAULT.blocks,
    data: Annotated[str | None, _data(help=DATA_HELP)] = None,
    column: Annotated[str | None, _data(help="Column of a table or dataset.")] = DEFAULT.column,
    label_column: Annotated[str | None, _data(help=LABEL_HELP)] = DEFAULT.label_column,
    samples: Annotated[int, _data(help="Texts, images or sounds at most.")] = DEFAULT.samples,
    length: Annotated[int, _data(help="Tokens of a text at most.")] = DEFAULT.length,
    batch_size: Annotated[
        int, _data(help="Samples in one forward pass. Changes no number beyond rounding.")
    ] = DEFAULT.batch_size,
    special_tokens: Annotated[
        bool, _data(help="Keep [CLS], [SEP] and the like in the text.")
    ] = DEFAULT.special_tokens,
    ablate: Annotated[list[str] | None, _measure(help=ABLATE_HELP)] = None,
    metrics: Annotated[
        str | None, _measure(help="Names, separated by commas, or 'all'. (default: all but the solvers)")
    ] = None,
    svd_samples: Annotated[int, _measure(help="Samples that ranks are measured on (slow).")] = DEFAULT.svd_samples,
    init: Annotated[
        bool, _measure(help="Also measure the same architecture freshly initialised.")
    ] = DEFAULT.init,
    init_seeds: Annotated[int, _measure(help="How many initialisations.")] = DEFAULT.init_seeds,
    seed: Annotated[int, _measure(help="Seed of the first.")] = DEFAULT.seed,
    recursion: Annotated[bool, _measure(help="Follow pure attention below the float floor.")] = DEFAULT.recursion,
    paths: Annotated[bool, _paths("--paths/--no-paths", help=PATHS_HELP)] = DEFAULT.paths,
    path_draws: Annotated[str | None, typer.Option(hidden=True)] = None,
    repeats: Annotated[int, _paths(help="Estimates of each, for the intervals.")] = DEFAULT.repeats,
    path_samples: Annotated[int, _paths(help="Samples that paths are measured on.")] = DEFAULT.path_samples,
    max_length: Annotated[int | None, _paths(help="Group all longer paths. (default: 8 if over 12 blocks)")] = None,
    count_mlp: Annotated[
        bool, _paths("--count-mlp", help="An MLP is a hop of a path, as a head is.")
    ] = DEFAULT.count_mlp,
    fail_if: Annotated[list[str] | None, _checks(help=FAIL_IF_HELP)] = None,
    baseline: Annotated[str | None, _checks(help=BASELINE_HELP)] = None,
    max_drop: Annotated[list[str] | None, _checks(help=MAX_DROP_HELP)] = None,
    out: Annotated[Path | None, _output(help=OUT_HELP)] = None,
    log_with: Annotated[list[str] | None, _output(help=LOG_HELP)] = None,
    quiet: Annotated[bool, _output("--quiet", "-q", help="No progress, no summary.")] = False,
    as_json: Annotated[bool, _output("--json", help="Print results.json on standard output.")] = False,
    resume: Annotated[
        bool, _output(help="Of several runs: skip those that are finished with the same settings.")
    ] = True,
    version: Annotated[
        bool, _output("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:  # fmt: skip
    """Measure rank collapse of a transformer on your data, and see what holds it up."""
    with one_line_errors(), interrupts() as check:
        job = Job.of(ctx.params, shlex.join(["rc-probe", *sys.argv[1:]]))  # before torch is imported
        found = checkpoints(model, revisions, revision)
        check_trackers(log_with or (), alone=not found and max(num_processes or 1, launched() or 1) == 1)
        if num_processes is not None:
            start_or_join(num_processes, job.settings)
        if found:
            raise SystemExit(_follow(ctx, job, found, check))
        done = run(job, check, quiet=quiet)
        if done is None:
            return
        result, outcomes = done
        if log_with:
            log_result(result, log_with, job.target)
        if as_json:
            typer.echo((job.target / "results.json").read_text(encoding="utf-8").rstrip("\n"))
        elif not quiet:
            from .terminal import summary

            summary(result, job.target)
        if outcomes:
            conclude(result, outcomes, quiet=quiet)
            raise SystemExit(exit_code(outcomes))


def _follow(ctx: typer.Context, job: Job, found: list[Checkpoint], check: Callable[[], None]) -> int:
    """Measure checkpoints, and compare them. Fresh weights are the same for all: measured only if asked for."""
    from .many_runs import ManyRuns, Planned, given

    explicit = given(ctx)
    options = dict(ctx.params) | ({} if "init" in explicit else {"init": False})
    planned = []
    for each in found:
        own = options | {"model": each.model, "revision": each.revision}
        place = job.target / folder_name(each.name.replace("/", "_"))
        planned.append(Planned(each.name, Job.of(own | {"out": place}), each.step))
    runs = ManyRuns(f"{folder_name(job.model)} over training", planned, job.target, job.command, options["resume"],
                  options["quiet"], options["as_json"])  # fmt: skip
    return runs.make(check)


def main(arguments: list[str] | None = None) -> None:
    """Run the command; ends the process with 0, 1 where a check failed, or 2 and one line on standard error.

    The first word may be one of COMMANDS; a folder of that name is given as ./NAME.
    """
    words = path_numbers(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        command = import_module(COMMANDS[words[0]]).app
        command(words[1:], prog_name=f"rc-probe {words[0]}")
    else:
        app(words, prog_name="rc-probe")


def path_numbers(words: list[str]) -> list[str]:
    """`--paths 5 20` as options with one value each: the numbers after --paths are how many are drawn."""
    out, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        numbers = word.removeprefix("--paths=").split(",") if word.startswith("--paths=") else []
        while word == "--paths" and rest and re.fullmatch(r"\d+(,\d+)*", rest[0]):
            numbers += rest.pop(0).split(",")
        out += ["--paths", "--path-draws", " ".join(numbers)] if numbers else [word]
    return out
