"""The command `rc-probe MODEL`. torch is imported only once there is something to measure."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from rc_probe import __version__
from rc_probe.hooks.errors import RcProbeError

from .launch import first_to_speak, launched, start_or_join
from .registry import METRICS
from .settings import Settings

if TYPE_CHECKING:
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

  rc-probe architectures llama                   what is proved about which model type
"""
DATA_HELP = (
    "A txt, jsonl, json, csv, tsv or parquet file, a folder of images or of sounds (wav, flac, ogg, mp3), or a "
    "Hub dataset name[:config][:split]. (default: bundled biographies or photographs)"
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
OUT_HELP = "Folder for report.html, results.json and the tables. (default: rc-probe-out/MODEL)"
COMMANDS = {"architectures": "rc_probe.census.command"}  # besides the main job
app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rc-probe {__version__}")
        raise typer.Exit


_model, _data, _measure, _paths, _output = (
    partial(typer.Option, rich_help_panel=panel)  # an option in a panel of --help
    for panel in ("The model", "The data", "What is measured", "Paths", "Output")
)


@app.command(epilog=EXAMPLES)
def measure(
    model: Annotated[str, typer.Argument(help="A Hub id, a folder, or 'demo' (the packaged all-MiniLM-L6-v2).")],
    revision: Annotated[str | None, _model(help="Branch, tag or commit of a Hub model.")] = DEFAULT.revision,
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
    out: Annotated[Path | None, _output(help=OUT_HELP)] = None,
    quiet: Annotated[bool, _output("--quiet", "-q", help="No progress, no summary.")] = False,
    as_json: Annotated[bool, _output("--json", help="Print results.json on standard output.")] = False,
    version: Annotated[
        bool, _output("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:  # fmt: skip
    """Measure rank collapse of a transformer on your data, and see what holds it up."""
    with one_line_errors(), interrupts() as check:
        chosen = Settings(
            data=data, revision=revision, dtype=dtype, device=device, device_map=device_map,
            offload_folder=offload_folder, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code,
            stack=stack, blocks=blocks, column=column, label_column=label_column, samples=samples, length=length,
            batch_size=batch_size, special_tokens=special_tokens, metrics=_metric_names(metrics),
            svd_samples=svd_samples, init=init, init_seeds=init_seeds, seed=seed, ablate=tuple(ablate or ()),
            recursion=recursion, paths=paths, path_draws=tuple(map(int, (path_draws or "").split())), repeats=repeats,
            path_samples=path_samples, max_length=max_length, count_mlp=count_mlp,
        )  # fmt: skip
        chosen.check()  # before torch is imported
        target = out or Path("rc-probe-out") / folder_name(model)
        if launched() is None:
            check_target(target)
        if num_processes is not None:
            start_or_join(num_processes, chosen)
        result = _run(model, chosen, target, check, quiet=quiet)
        if result is None:
            return
        if as_json:
            typer.echo((target / "results.json").read_text(encoding="utf-8").rstrip("\n"))
        elif not quiet:
            from .show import summary

            summary(result, target)


def _run(
    model: str, chosen: Settings, target: Path, check: Callable[[], None], *, quiet: bool
) -> ProbeResult | None:
    """Measure with a progress bar, and save; `check` is called on every step. None in all processes but the first."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's own words when a process is gone
    from .show import progress_bar
    from .world import World

    joined = World.join(cpu=(chosen.device or "").startswith("cpu"))
    with joined as world, one_line_errors(world), progress_bar(hidden=quiet or world.rank > 0) as show:
        if world.rank == 0:
            check_target(target)

        def report(stage: str, done: int, total: int) -> None:
            check()
            show(stage, done, total)

        from . import api

        command = shlex.join(["rc-probe", *sys.argv[1:]])
        result = api.measure(model, chosen, progress=report, command=command, world=world)
        report("writing the report", 1, 1)
        if world.rank == 0:
            result.save(target)
        world.gather(None, "end")
    return result if world.rank == 0 else None


def _metric_names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    return tuple(METRICS) if names == ["all"] else tuple(names)


def folder_name(model: str) -> str:
    """The last part of a model id or path, as a folder's name."""
    name = Path(model).name or Path(model).resolve().name
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "model"


def check_target(target: Path) -> None:
    """Find out before the measurement, not after it, that nothing can be written there."""
    there = target
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise RcProbeError(f"{there} is a file", where=f"--out {target}", todo="Give a folder")
    if not os.access(there, os.W_OK):
        raise RcProbeError(f"{there} cannot be written", where=f"--out {target}", todo="Give another folder")


def main(arguments: list[str] | None = None) -> None:
    """Run the command; ends the process with 0, or 2 and one line on standard error.

    The first word may be one of COMMANDS; a folder of that name is given as ./NAME.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in COMMANDS:
        command = import_module(COMMANDS[words[0]]).app
        command(words[1:], prog_name=f"rc-probe {words[0]}")
    else:
        app(_path_numbers(words), prog_name="rc-probe")


def _path_numbers(words: list[str]) -> list[str]:
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
        fail(line)


def _line(error: BaseException) -> str:
    """What to say about an error; raises those that are no user's."""
    if isinstance(error, RcProbeError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted. Nothing was written; the same command starts anew"
    if isinstance(error, Exception) and out_of_memory(error):
        return "out of memory. Try a smaller --batch-size or --length, or --dtype bfloat16"
    raise error


def out_of_memory(error: Exception) -> bool:
    """Whether torch could not allocate, on the GPU or on the CPU."""
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text or isinstance(error, MemoryError)


def fail(line: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    typer.echo(f"rc-probe: {' '.join(line.split())}", err=True)
    raise SystemExit(2)
