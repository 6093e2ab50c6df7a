"""The command `rc-probe MODEL`. torch is imported only once there is something to measure."""

from __future__ import annotations

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

from .registry import METRICS
from .settings import Settings
from .track import check_trackers, log_result

if TYPE_CHECKING:
    from .results import ProbeResult

DEFAULT = Settings()
EXAMPLES = """
Examples:

  rc-probe demo                                  the packaged all-MiniLM-L6-v2, bundled texts

  rc-probe bert-base-uncased --data reviews.csv  your own texts

  rc-probe ./my-vit --data photos/               a folder of images

  rc-probe ./my-wav2vec2 --data speech/          a folder of sounds

  rc-probe gpt2 --ablate mlp@7 --ablate head@2:5 the model without a part, beside the whole

  rc-probe t5-small --stack encoder              one stack or tower of several

  rc-probe gpt2 --no-init --json --quiet | jq .verdict

  rc-probe lm-eval gpt2 --tasks arc_easy --ablate mlp@7   accuracy without a part

  rc-probe architectures llama                   what is proved about which model type
"""
DATA_HELP = (
    "A txt, jsonl, json, csv, tsv or parquet file, a folder of images or of sounds (wav, flac, ogg, mp3), a Hub "
    "dataset name[:config][:split], or lm-eval:TASK. (default: bundled biographies or photographs)"
)
STACK_HELP = (
    "Encoder, decoder or tower, by its name or a part of it: 'encoder', 'vision'. (default: the last)"
)
BLOCKS_HELP = "Names of the blocks, where they are not found: 'encoder.layer.*'."
LABEL_HELP = (
    "Column of what is right: a class by name or number; for embeddings also a paired text, or TEXT,SCORE. Of a folder "
    "of images or sounds: 'folder', the names of the folders in it."
)
ABLATE_HELP = (
    "Leave a part out and compare: attention.skip@3-5, mlp@7, mlp.skip, attention@all, head@2:5, "
    "mlp@4=0.5. Blocks and heads count from 1. Repeat for more; join parts by '+'."
)
OUT_HELP = "Folder for report.html, results.json and the tables. (default: rc-probe-out/MODEL)"
LOG_HELP = (
    "Also log to a tracker of accelerate: tensorboard, wandb, mlflow, trackio … Curves by layer, a step a layer. "
    "Repeat for more."
)
COMMANDS = {  # besides the main job
    "architectures": "rc_probe.census.command",
    "lm-eval": "rc_probe.harness_command",
}
app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rc-probe {__version__}")
        raise typer.Exit


_model, _data, _measure, _output = (
    partial(typer.Option, rich_help_panel=panel)  # an option in a panel of --help
    for panel in ("The model", "The data", "What is measured", "Output")
)


@app.command(epilog=EXAMPLES)
def measure(
    model: Annotated[str, typer.Argument(help="A Hub id, a folder, or 'demo' (the packaged all-MiniLM-L6-v2).")],
    revision: Annotated[str | None, _model(help="Branch, tag or commit of a Hub model.")] = DEFAULT.revision,
    dtype: Annotated[str, _model(help="float32, float64, bfloat16, float16, or auto.")] = DEFAULT.dtype,
    device: Annotated[str | None, _model(help="cpu, cuda, cuda:1 … (default: cuda if there is one)")] = DEFAULT.device,
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
    out: Annotated[Path | None, _output(help=OUT_HELP)] = None,
    log_with: Annotated[list[str] | None, _output(help=LOG_HELP)] = None,
    quiet: Annotated[bool, _output("--quiet", "-q", help="No progress, no summary.")] = False,
    as_json: Annotated[bool, _output("--json", help="Print results.json on standard output.")] = False,
    version: Annotated[
        bool, _output("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:  # fmt: skip
    """Measure rank collapse of a transformer on your data, and see what holds it up."""
    with one_line_errors(), interrupts() as check:
        chosen = Settings(
            data=data, revision=revision, dtype=dtype, device=device, allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code, stack=stack, blocks=blocks, column=column, label_column=label_column,
            samples=samples, length=length, batch_size=batch_size, special_tokens=special_tokens, metrics=_metric_names(metrics),
            svd_samples=svd_samples, init=init, init_seeds=init_seeds, seed=seed, ablate=tuple(ablate or ()),
            recursion=recursion,
        )  # fmt: skip
        chosen.check()  # before torch is imported
        target = out or Path("rc-probe-out") / folder_name(model)
        check_target(target)
        check_trackers(log_with or ())
        result = _run(model, chosen, target, check, quiet=quiet)
        if log_with:
            log_result(result, log_with, target)
        if as_json:
            typer.echo((target / "results.json").read_text(encoding="utf-8").rstrip("\n"))
        elif not quiet:
            from .show import summary

            summary(result, target)


def _run(
    model: str, chosen: Settings, target: Path, check: Callable[[], None], *, quiet: bool
) -> ProbeResult:
    """Measure with a progress bar, and save; `check` is called on every step."""
    from .show import progress_bar

    with progress_bar(hidden=quiet) as show:

        def report(stage: str, done: int, total: int) -> None:
            check()
            show(stage, done, total)

        from . import api

        command = shlex.join(["rc-probe", *sys.argv[1:]])
        result = api.measure(model, chosen, progress=report, command=command)
        report("writing the report", 1, 1)
        result.save(target)
    return result


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
    import os

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
        app(words, prog_name="rc-probe")


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
def one_line_errors() -> Iterator[None]:
    """What a user can run into ends the process with one line on standard error and exit code 2."""
    try:
        yield
    except RcProbeError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted. Nothing was written; the same command starts anew")
    except Exception as error:
        if not out_of_memory(error):
            raise
        fail("out of memory. Try a smaller --batch-size or --length, or --dtype bfloat16")


def out_of_memory(error: Exception) -> bool:
    """Whether torch could not allocate, on the GPU or on the CPU."""
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text or isinstance(error, MemoryError)


def fail(line: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    typer.echo(f"rc-probe: {' '.join(line.split())}", err=True)
    raise SystemExit(2)
