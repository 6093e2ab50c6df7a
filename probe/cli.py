"""The command `rc-probe MODEL`. torch is imported only once there is something to measure."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from rc_probe import __version__
from rc_probe.hooks.errors import RcProbeError

from .checks import exit_code, table_of
from .follow import Checkpoint, checkpoints
from .job import Job, check_target, folder_name
from .launch import first_to_speak, launched, start_or_join
from .settings import Settings
from .track import check_trackers, log_result

if TYPE_CHECKING:
    from .checks import Outcome
    from .results import ProbeResult
    from .world import World

DEFAULT = Settings()
EXAMPLES = """
Examples:

  rc-probe demo                                  the packaged all-MiniLM-L6-v2, bundled texts

  rc-probe bert-base-uncased --data reviews.csv  your own texts

  rc-probe ./my-vit --data photos/               a folder of images

  rc-probe ./my-wav2vec2 --data speech/          a folder of sounds

  rc-probe gpt2 --ablate mlp@7 --ablate head@2:5 the model without a part, beside the whole

  rc-probe gpt2 --paths 5 20 --repeats 5         paths drawn, beside the exact numbers

  rc-probe gpt2 --num-processes 4                the samples shared among four GPUs

  rc-probe t5-small --stack encoder              one stack or tower of several

  rc-probe gpt2 --no-init --json --quiet | jq .verdict

  rc-probe ./new --fail-if 'residual@last<0.1'   exit code 1 where the last layer is collapsed

  rc-probe ./checkpoints                         collapse over training, from a folder of checkpoints

  rc-probe sweep models.txt --data texts.txt     a list of models, one a line, and their comparison

  rc-probe compare RUN RUN …                     results of several models or versions in one report

  rc-probe lm-eval gpt2 --tasks arc_easy --ablate mlp@7   accuracy without a part

  rc-probe architectures llama                   what is proved about which model type
"""
REVISIONS_HELP = (
    "Several, separated by commas: step0,step1000,… Of a folder: checkpoints below it, such as 'checkpoint-*'. Each "
    "is measured, then compared over training. A folder of checkpoints alone needs no option."
)
DATA_HELP = (
    "A txt, jsonl, json, csv, tsv or parquet file, a folder of images or of sounds (wav, flac, ogg, mp3), a Hub "
    "dataset name[:config][:split], or lm-eval:TASK. (default: bundled biographies or photographs)"
)
STACK_HELP = (
    "Encoder, decoder or tower, by its name or a part of it: 'encoder', 'vision'. (default: the last)"
)
MAP_HELP = "For a model larger than one GPU: auto, balanced, balanced_low_0, sequential, or a JSON file of {module: device}."
PROCESSES_HELP = "Share the samples among N processes of this machine, one for each GPU. (default: 1)"
BLOCKS_HELP = "Names of the blocks, where they are not found: 'encoder.layer.*'."
LABEL_HELP = (
    "Column of what is right: a class by name or number; for embeddings also a paired text, or TEXT,SCORE. Of a folder "
    "of images or sounds: 'folder', the names of the folders in it."
)
ABLATE_HELP = (
    "Leave a part out and compare: attention.skip@3-5, mlp@7, mlp.skip, attention@all, head@2:5, "
    "mlp@4=0.5. Blocks and heads count from 1. Repeat for more; join parts by '+'."
)
PATHS_HELP = (
    "How much paths of each length do, exactly. With numbers, '--paths 5 20', also sampled and live: so many paths drawn "
    "at each length."
)
FAIL_IF_HELP = (
    "End with exit code 1 if this holds: 'residual@last<0.1', 'cosine@max:SAN>0.99'. METRIC@WHERE[:VARIANT], WHERE "
    "a layer, first, last, min, max or mean; then < <= > >= and a number, in quotes. Repeat for more."
)
BASELINE_HELP = (
    "results.json of an earlier run on the same samples: end with 1 if a layer got worse than there."
)
MAX_DROP_HELP = (
    "By how much it may: 0.05 of the residual (the default), or METRIC[:VARIANT]=NUMBER. Repeat for more."
)
OUT_HELP = "Folder for report.html, results.json and the tables. (default: rc-probe-out/MODEL)"
LOG_HELP = (
    "Also log to a tracker of accelerate: tensorboard, wandb, mlflow, trackio … Curves by layer, a step a layer. "
    "Repeat for more."
)
COMMANDS = {  # besides the main job
    "architectures": "rc_probe.census.command",
    "compare": "rc_probe.compare_command",
    "lm-eval": "rc_probe.harness_command",
    "sweep": "rc_probe.sweep",
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
    max_length: Annotated[int | None, _paths(help="Longer paths are one part. (default: none are)")] = None,
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
        bool, _output(help="Of several runs: leave out those that are there with the same settings.")
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
            from .show import summary

            summary(result, job.target)
        if outcomes:
            conclude(result, outcomes, quiet=quiet)
            raise SystemExit(exit_code(outcomes))


def _follow(ctx: typer.Context, job: Job, found: list[Checkpoint], check: Callable[[], None]) -> int:
    """Measure checkpoints, and compare them. Fresh weights are the same for all: measured only if asked for."""
    from .many import Batch, Planned, command_of, given

    explicit = given(ctx)
    options = dict(ctx.params) | ({} if "init" in explicit else {"init": False})
    planned = []
    for each in found:
        own = options | {"model": each.model, "revision": each.revision}
        place = job.target / folder_name(each.name.replace("/", "_"))
        names = [*explicit, "init", *(["revision"] if each.revision else [])]
        command = command_of(own, each.model, place, names)
        planned.append(Planned(each.name, Job.of(own | {"out": place}, command), each.step))
    batch = Batch(f"{folder_name(job.model)} over training", planned, job.target, job.command, options["resume"],
                  options["quiet"], options["as_json"])  # fmt: skip
    return batch.run(check)


def run(
    job: Job, check: Callable[[], None], *, quiet: bool, label: str = ""
) -> tuple[ProbeResult, list[Outcome]] | None:
    """Measure with a progress bar, and save with what the job's checks found. None in all processes but the first.

    check: called on every step; label: before what the bar says
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's own words when a process is gone
    from .resume import asked
    from .show import progress_bar
    from .world import World

    wanted = asked(job)
    joined = World.join(cpu=(job.settings.device or "").startswith("cpu"))
    several = one_line_errors(joined) if joined.size > 1 else nullcontext()
    with joined as world, several, progress_bar(hidden=quiet or world.rank > 0) as show:
        if world.rank == 0:
            check_target(job.target)

        def report(stage: str, done: int, total: int) -> None:
            check()
            show(label + stage, done, total)

        from . import api

        result = api.measure(job.model, job.settings, progress=report, command=job.command, world=world)
        result.settings["asked"] = wanted
        outcomes = job.checks.evaluate(result)
        if outcomes:
            result.tables["checks"] = table_of(outcomes)
        report("writing the report", 1, 1)
        if world.rank == 0:
            result.save(job.target)
        world.gather(None, "end")
    return (result, outcomes) if world.rank == 0 else None


def conclude(result: ProbeResult, outcomes: list[Outcome], *, quiet: bool, name: str | None = None) -> None:
    """A line for each check on standard error: standard output stays the summary, or JSON."""
    from .ci import tell

    def say(line: str) -> None:
        typer.echo(f"{name}: {line}" if name and not line.startswith("::") else line, err=True)

    tell(name or str(result.model["id"]), result.verdict["sentence"], outcomes, say, quiet=quiet)


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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C. A class of its own: Python ends by the signal itself after a bare KeyboardInterrupt in `exec`."""


@contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C raises Interrupted; yields a check that raises it when a library has swallowed the first one."""
    seen = []

    def note(number: int, frame: object) -> None:
        seen.append(number)
        raise Interrupted

    def check() -> None:
        if seen:
            raise Interrupted

    def ignored(event: Any) -> None:
        if event.exc_type is not Interrupted:  # swallowed in some __del__; `check` raises it again
            hook_before(event)

    before, hook_before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    sys.unraisablehook = ignored
    ours = threading.current_thread() is threading.main_thread()  # others cannot set handlers
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        sys.unraisablehook = hook_before
        if ours:
            signal.signal(signal.SIGINT, before)


@contextmanager
def one_line_errors(world: World | None = None) -> Iterator[None]:
    """What a user can run into ends the process with one line on standard error and exit code 2.

    Of the processes of `world`, one on each machine says it.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and launched() is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # launchers hand it on, to those who know already
        line = _line(error)
        if not (first_to_speak() if world is None else world.post(error)):
            raise SystemExit(2) from None
        if line is None:  # a fault of ours; Python's own exit code would be that of a failed check
            traceback.print_exc()
            raise SystemExit(2) from error
        fail(line)


def _line(error: BaseException) -> str | None:
    """What to say about an error; None about those that are no user's."""
    if isinstance(error, RcProbeError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted. Nothing was written; the same command starts anew"
    if out_of_memory(error):
        return "out of memory. Try a smaller --batch-size or --length, or --dtype bfloat16"
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether torch could not allocate, on the GPU or on the CPU."""
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text or isinstance(error, MemoryError)


def fail(line: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    typer.echo(f"rc-probe: {' '.join(line.split())}", err=True)
    raise SystemExit(2)
