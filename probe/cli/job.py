"""One measurement as the command asks for it: model, settings, checks, and the folder that it goes to."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from rc_probe.hooks.errors import RcProbeError
from rc_probe.processes.launch import launched
from rc_probe.registry import METRICS
from rc_probe.results.checks import Checks
from rc_probe.results.protocols import Result
from rc_probe.settings import Settings


@dataclass(frozen=True)
class Job:
    """What to measure. command: what repeats it alone."""

    model: str
    settings: Settings
    checks: Checks
    target: Path
    command: str

    @classmethod
    def of(cls, options: Mapping[str, Any], command: str | None = None) -> Self:
        """From the values of the command's options by name; all that can be wrong without torch is refused.

        Without a `command`, the one that makes this run alone is written out.
        """
        known = {field.name: options[field.name] for field in fields(Settings) if field.name in options}
        known["metrics"] = metric_names(options["metrics"])
        known["ablate"] = tuple(options["ablate"] or ())
        known["path_draws"] = drawn(options.get("path_draws") or "")
        settings = Settings(**known)
        settings.check()
        checks = Checks.of(
            options["fail_if"] or (),
            _baseline(options["baseline"]),
            options["max_drop"] or (),
            options["baseline"] or "",
        )
        checks.plan(settings)
        target = Path(options["out"] or Path("rc-probe-out") / folder_name(options["model"]))
        if launched() is None:  # else by the first of the processes alone, once they know each other
            check_target(target)
        alone = [*settings.words(options["model"]), *checks.words, "--out", str(target)]
        return cls(options["model"], settings, checks, target, command or shlex.join(alone))


def _baseline(place: str | None) -> Result | None:
    """Read before anything is measured, so that a missing one is known in time."""
    if place is None:
        return None
    from rc_probe.result import ProbeResult

    return ProbeResult.load(place)


def metric_names(text: str | None) -> tuple[str, ...] | None:
    """Names separated by commas, or `all`."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    return tuple(METRICS) if names == ["all"] else tuple(names)


def drawn(text: str) -> tuple[int, ...]:
    """The numbers behind `--paths`, separated by spaces."""
    try:
        return tuple(int(number) for number in text.split())
    except ValueError:
        todo = "Write --paths, or --paths 5 20"
        raise RcProbeError(f"{text!r} are no numbers of paths", where="--paths", todo=todo) from None


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
