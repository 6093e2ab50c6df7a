"""`rc-probe sweep models.txt`: a list of models, each measured as by `rc-probe MODEL`, then compared."""

from __future__ import annotations

import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from rc_probe.hooks.errors import RcProbeError
from rc_probe.integrations.trackers import check_trackers

from .app import app as main_app
from .app import path_numbers
from .errors import interrupts, one_line_errors, usage
from .finished_runs import free_folder
from .job import Job, check_target, folder_name, out_folder
from .many_runs import ManyRuns, Planned, given, refuse_processes

NO_OPTIONS = ("model", "revisions", "install_completion", "show_completion")  # of a sweep
OF_THE_SWEEP = ("out", "quiet", "as_json", "resume", "revisions", "version")  # not of one line
MAIN = typer.main.get_command(main_app)


class _WithOptions(TyperCommand):
    """A command that takes the options of `rc-probe MODEL`, too; those given are in the context's `obj`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params += [option for option in MAIN.params if option.name not in NO_OPTIONS]

    def invoke(self, ctx: Any) -> Any:
        ctx.obj = {name: ctx.params[name] for name in given(ctx) if name != "models"}
        ctx.params = {"models": ctx.params["models"]}
        return super().invoke(ctx)


app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command(cls=_WithOptions)
def sweep(
    ctx: typer.Context,
    models: Annotated[Path, typer.Argument(metavar="FILE", help="A text file: one model per line, options after it, # for comments.")],
) -> None:  # fmt: skip
    """Measure every model of a list, and compare them. Options of `rc-probe MODEL` are for all of them.

    A line such as `gpt2 --length 64` has options of its own. What is there with the same settings is not measured again.
    """
    with one_line_errors(), interrupts() as check:
        options: dict[str, Any] = ctx.obj
        target = out_folder(options.get("out"), folder_name(models.stem))
        check_target(target)
        runs = ManyRuns(
            title=models.stem,
            planned=_planned(models, options, target),
            target=target,
            command=shlex.join(["rc-probe", *sys.argv[1:]]),
            resume=options.get("resume", True),
            quiet=options.get("quiet", False),
            as_json=options.get("as_json", False),
        )
        raise SystemExit(runs.make(check))


def _planned(source: Path, common: dict[str, Any], target: Path) -> list[Planned]:
    """One run per line; everything that can be wrong with a line is refused before the first run."""
    lines = _lines(source)
    names = _names([words for _, words in lines])
    planned: list[Planned] = []
    taken: set[Path] = set()
    for (number, words), name in zip(lines, names, strict=True):
        where = f"{source}, line {number}"
        defaults, own = _parsed(words, where)
        options = defaults | common | own
        place = free_folder(target / folder_name(name.replace("/", "_")), lambda place: place not in taken)
        try:
            refuse_processes(options["num_processes"])
            check_trackers(options["log_with"] or (), alone=False)
            job = Job.of(options | {"out": place})
        except RcProbeError as error:
            raise RcProbeError(str(error), where=where) from error
        planned.append(Planned(name, job))
        taken.add(place)
    return planned


def _lines(source: Path) -> list[tuple[int, list[str]]]:
    """(number, words) of the lines that say something."""
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        todo = "Give a text file with one model per line"
        raise RcProbeError(f"cannot be read ({error})", where=str(source), todo=todo) from error
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise RcProbeError(str(error), where=f"{source}, line {number}") from error
        if words:
            found.append((number, words))
    if not found:
        raise RcProbeError("it names no model", where=str(source), todo="Write one model per line")
    twice = [words for words, count in Counter(tuple(words) for _, words in found).items() if count > 1]
    if twice:
        raise RcProbeError(f"{shlex.join(twice[0])} is listed twice", where=str(source))
    return found


def _parsed(words: list[str], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(all options with their defaults, those that the line gives) by name."""
    try:
        context = MAIN.make_context("rc-probe", path_numbers(words))
    except typer.Exit as error:
        raise RcProbeError("it asks for no measurement", where=where, todo="Give a model") from error
    except Exception as error:
        if (line := usage(error)) is None:
            raise
        raise RcProbeError(line, where=where) from error
    own = {name: context.params[name] for name in given(context)}
    for name in OF_THE_SWEEP:
        if name in own:
            todo = "Give it to the sweep, not to a line"
            raise RcProbeError(f"--{name.replace('_', '-')} is no option of a line", where=where, todo=todo)
    return dict(context.params), own


def _names(lines: list[list[str]]) -> list[str]:
    """Of each line the last part of its model, with its options; more of the model where two were the same."""
    levels = [
        [_name(shorten(words[0]), words[1:]) for words in lines]
        for shorten in (folder_name, lambda model: model.strip("./"), str)
    ]
    counts = [Counter(level) for level in levels]
    return [
        next(name for name, count in zip(names, counts, strict=True) if count[name] == 1 or name == names[-1])
        for names in zip(*levels, strict=True)
    ]


def _name(model: str, options: list[str]) -> str:
    return " ".join([model, *(re.sub(r"^--?", "", word) for word in options)])
