"""Checkpoints of one training: revisions of a Hub model, or the folders below a folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from rc_probe.hooks.errors import RcProbeError

from .packaged import DEMOS, check_revision, is_here

CONFIGS = ("config.json", "adapter_config.json")  # what makes a folder a model, or an adapter of one
_STEP = re.compile(r"(?:steps?|checkpoint|ckpt|global_step|iter)[-_]?(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Checkpoint:
    """A model as it was at one step of its training (None where its name tells no step)."""

    name: str
    model: str
    revision: str | None
    step: int | None = None


def checkpoints(model: str, revisions: str | None, revision: str | None = None) -> list[Checkpoint]:
    """What `model` with `--revisions` stands for, in the order of training; none where it is one model.

    A folder without a config.json, but with folders that have one, is a folder of checkpoints. There `revisions`
    names some of these (`checkpoint-*`), also below a folder that is a model itself; of a Hub model its revisions.
    """
    check_revision(model, revision)
    folder = Path(model).expanduser() if is_here(model) and model not in DEMOS else None
    there = _below(folder) if folder and folder.is_dir() else []
    if revisions is None:
        if folder is None or not there or _is_model(folder):
            return []
        names = there
    else:
        if revision is not None:
            raise RcProbeError("both are given", where="--revision, --revisions", todo="Give one of them")
        if model in DEMOS:
            todo = "Give a Hub model, or a folder of checkpoints"
            raise RcProbeError("the packaged model has no revisions", where="--revisions", todo=todo)
        asked = list(dict.fromkeys(name.strip() for name in revisions.split(",") if name.strip()))
        if not asked:
            raise RcProbeError("it names none", where="--revisions", todo="Write step0,step1000")
        names = _chosen(asked, there, model) if folder and folder.is_dir() else asked
    steps = _steps(names)
    made = [
        Checkpoint(name, str(folder / name), None, step)
        if folder and folder.is_dir()
        else Checkpoint(name, model, name, step)
        for name, step in zip(names, steps, strict=True)
    ]
    return made if None in steps else sorted(made, key=lambda each: each.step or 0)


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in CONFIGS)


def _below(folder: Path) -> list[str]:
    """Names of the folders of models below, in natural order: checkpoint-500 before checkpoint-1000."""
    names = [each.name for each in folder.iterdir() if each.is_dir() and _is_model(each)]
    return sorted(names, key=lambda name: [(part.isdigit(), int(part) if part.isdigit() else 0, part)
                                           for part in re.split(r"(\d+)", name)])  # fmt: skip


def _chosen(asked: list[str], there: list[str], model: str) -> list[str]:
    chosen: list[str] = []
    for pattern in asked:
        found = [name for name in there if fnmatchcase(name, pattern)]
        if not found:
            near = get_close_matches(pattern, there, n=1)
            todo = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(there) or 'none'}"
            raise RcProbeError(f"no checkpoint {pattern!r} in {model}", where="--revisions", todo=todo)
        chosen += found
    return list(dict.fromkeys(chosen))


def _steps(names: list[str]) -> list[int | None]:
    """The step that each name tells, or None for all where one tells none or two the same."""
    steps: list[int | None] = []
    for name in names:
        numbers = _STEP.findall(name) or re.findall(r"\d+", name)
        steps.append(int(numbers[0]) if len(numbers) == 1 or (numbers and _STEP.search(name)) else None)
    told = None not in steps and len(set(steps)) == len(steps)
    return steps if told else [None] * len(names)
