"""The command `rc-probe MODEL`. torch is imported only once there is something to measure."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from rc_probe import __version__
from rc_probe.common_options import MODEL
from rc_probe.hooks.errors import RcProbeError
from rc_probe.integrations.trackers import check_trackers, log_result
from rc_probe.models.checkpoints import Checkpoint, checkpoints
from rc_probe.models.packaged import DEMOS
from rc_probe.processes.launch import launched, start_or_join
from rc_probe.results.checks import exit_code
from rc_probe.settings import Settings

from .errors import INTERRUPTED, fail, interrupts, one_line_errors
from .finished_runs import interrupted, placed
from .generated import with_options
from .job import Job, folder_name
from .one_run import conclude, run, tell_faults

COMMANDS = {  # besides the main job: what each is for
    "sweep": "A list of models, one per line, and their comparison.",
    "compare": "Several results in one report.",
    "diff": "How far one model is from another, by layer, block and branch.",
    "experiment": "The papers' small trained experiments, claim by claim.",
    "lm-eval": "Scores of lm-evaluation-harness without parts of a model.",
    "architectures": "What is proved about which model type.",
}
EXAMPLES = f"""
Commands:

{"".join(f"  rc-probe {name:14}{what}{chr(10) * 2}" for name, what in COMMANDS.items())}Examples:

  rc-probe demo                                  the packaged all-MiniLM-L6-v2, bundled texts

  rc-probe bert-base-uncased --data reviews.csv  your own texts

  rc-probe ./my-vit --data photos/               a folder of images

  rc-probe ./my-wav2vec2 --data speech/          a folder of sounds

  rc-probe gpt2 --ablate mlp@7 --ablate head@2:5 the model without a part, beside the whole

  rc-probe gpt2 --paths 5 20 --repeats 5         paths drawn, beside the exact numbers

  rc-probe gpt2 --num-processes 4                the samples shared among four GPUs

  rc-probe t5-small --stack encoder              one stack or tower of several

  rc-probe gpt2 --no-init --json --quiet | jq .verdict

  rc-probe ./new --fail-if 'residual_bulk@last<0.1' exit code 1 where the last layer is collapsed

  rc-probe ./checkpoints                         collapse over training, from a folder of checkpoints

  rc-probe sweep models.txt --data texts.txt     a list of models, one per line, and their comparison

  rc-probe compare RUN RUN …                     results of several models or versions in one report

  rc-probe diff gpt2 ./tuned --data texts.txt    where a tuned, merged or quantised model differs

  rc-probe experiment sort                       a paper's experiment on this machine; --list names all

  rc-probe lm-eval gpt2 --tasks arc_easy --ablate mlp@7   accuracy without a part

  rc-probe architectures llama                   what is proved about which model type
"""
MODEL_HELP = "A Hub id, a folder, a .gguf file, 'demo' (the packaged all-MiniLM-L6-v2) or 'demo-decoder' (SmolLM2-135M-Instruct)."
REVISIONS_HELP = (
    "Several, separated by commas: step0,step1000,… Of a folder: checkpoints below it, such as 'checkpoint-*'. Each "
    "is measured, then compared over training. A folder of checkpoints alone needs no option."
)
PROCESSES_HELP = "Share the samples among N processes of this machine, one for each GPU. (default: 1)"
FAIL_IF_HELP = (
    "End with exit code 1 if this holds: 'residual_bulk@last<0.1', 'cosine@max:SAN>0.99'. METRIC@WHERE[:VARIANT], WHERE "
    "a layer, first, last, min, max or mean; then < <= > >= and a number, in quotes. Repeat for more."
)
BASELINE_HELP = (
    "results.json of an earlier run on the same samples: end with 1 if a layer got worse than there."
)
MAX_DROP_HELP = "Largest allowed drop: 0.05 of the residual of the bulk (the default), or METRIC[:VARIANT]=NUMBER. Repeat for more."
OUT_HELP = "Folder for report.html, results.json and the tables. (default: rc-probe-out/MODEL)"
LOG_HELP = (
    "Also log to a tracker of accelerate: tensorboard, wandb, mlflow, trackio … Curves by layer, one step per layer. "
    "Repeat for more."
)
COMPLETES = "_RC_PROBE_COMPLETE"  # set by the shell's script of --show-completion
app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rc-probe {__version__}")
        raise typer.Exit


_model, _checks, _output = (
    partial(typer.Option, rich_help_panel=panel)  # an option in a panel of --help
    for panel in (MODEL, "Checks", "Output")
)


@app.command(epilog=EXAMPLES)
@with_options(Settings)
def measure(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    revisions: Annotated[str | None, _model(help=REVISIONS_HELP)] = None,
    num_processes: Annotated[int | None, _model(help=PROCESSES_HELP, min=1)] = None,
    fail_if: Annotated[list[str] | None, _checks(help=FAIL_IF_HELP)] = None,
    baseline: Annotated[str | None, _checks(help=BASELINE_HELP)] = None,
    max_drop: Annotated[list[str] | None, _checks(help=MAX_DROP_HELP)] = None,
    out: Annotated[str | None, _output(help=OUT_HELP)] = None,
    log_with: Annotated[list[str] | None, _output(help=LOG_HELP)] = None,
    quiet: Annotated[bool, _output("--quiet", "-q", help="No progress, no summary.")] = False,
    as_json: Annotated[bool, _output("--json", help="Print results.json on standard output.")] = False,
    resume: Annotated[
        bool, _output(help="Of several runs: skip those that are finished with the same settings.")
    ] = True,
    version: Annotated[
        bool, _output("--version", "-V", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    **chosen: Any,
) -> None:  # fmt: skip
    """Measure rank collapse of a transformer on your data, and see what holds it up."""
    with one_line_errors(), interrupts() as check:
        job = Job.of(ctx.params, shlex.join(["rc-probe", *sys.argv[1:]]))  # before torch is imported
        found = checkpoints(model, revisions, chosen["revision"])
        check_trackers(log_with or (), alone=not found and max(num_processes or 1, launched() or 1) == 1)
        if num_processes is not None:
            start_or_join(num_processes, job.settings)
        if found:
            raise SystemExit(_follow(ctx, job, found, check))
        job = placed(job, chosen=out is not None, say=partial(_aside, quiet=quiet))
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
        if left := interrupted(result):
            fail(f"interrupted. Saved without {', '.join(left)}: {job.target}", INTERRUPTED)
        tell_faults(result)
        raise SystemExit(exit_code(outcomes, result))


def _aside(line: str, *, quiet: bool) -> None:
    if not quiet and launched() is None:
        typer.echo(f"rc-probe: {line}", err=True)


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
    if COMPLETES in os.environ:
        _every_command()(prog_name="rc-probe", complete_var=COMPLETES)
    with one_line_errors():
        name = words[0] if words else ""
        try:
            if name in COMMANDS:
                code = _command(name).main(words[1:], prog_name=f"rc-probe {name}", standalone_mode=False)
            else:
                _refuse_misspelt(name)
                code = typer.main.get_command(app).main(words, prog_name="rc-probe", standalone_mode=False)
        finally:
            sys.stdout.flush()  # here it is known what to do where nobody reads it any more
    raise SystemExit(code or 0)


def _command(name: str) -> Any:
    return typer.main.get_command(import_module(f"rc_probe.cli.{name.replace('-', '_')}").app)


def _refuse_misspelt(word: str) -> None:
    """RcProbeError for a word that is no model, but nearly a command or a packaged model."""
    near = get_close_matches(word, [*COMMANDS, *DEMOS], n=1, cutoff=0.7)
    if near and word not in DEMOS and not Path(word).exists():
        raise RcProbeError("no such command or model", where=word, todo=f"Did you mean {near[0]}?")


def _every_command() -> Any:
    """All commands as one group, for completion by the shell: options of the main job stand beside the names."""
    options = [each for each in typer.main.get_command(app).params if each.param_type_name == "option"]
    return typer.core.TyperGroup(
        name="rc-probe", params=options, commands={name: _command(name) for name in COMMANDS}
    )


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
