"""One measurement as the command asks for it: model, settings, checks, and the folder that it goes to."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rc_probe.common_options import CommonOptions
from rc_probe.data.places import check_place
from rc_probe.processes.launch import launched
from rc_probe.results.checks import Checks
from rc_probe.results.json_file import given_path
from rc_probe.results.protocols import Result
from rc_probe.results.saving import check_folder
from rc_probe.settings import Settings

from .generated import chosen_options


@dataclass(frozen=True)
class Job:
    """What to measure. command: what repeats it alone."""

    model: str
    settings: CommonOptions
    checks: Checks
    target: Path
    command: str

    @classmethod
    def of(cls, options: Mapping[str, Any], command: str | None = None) -> Self:
        """From the values of the command's options by name; all that can be wrong without torch is refused.

        Without a `command`, the one that makes this run alone is written out.
        """
        settings: CommonOptions = chosen_options(Settings, options)  # type: ignore[assignment]
        settings.check()
        check_place(settings.data)
        checks = Checks.of(
            options["fail_if"] or (),
            _baseline(options["baseline"]),
            options["max_drop"] or (),
            options["baseline"] or "",
        )
        checks.plan(settings)  # type: ignore[arg-type]  # the options of the curves are among them
        target = out_folder(options["out"], folder_name(options["model"]))
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


def folder_name(model: str) -> str:
    """The last part of a model id or path, as a folder's name."""
    name = Path(model).name or Path(model).resolve().name
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "model"


def out_folder(given: str | os.PathLike[str] | None, name: str) -> Path:
    """The folder of `--out`, or rc-probe-out/NAME."""
    return Path("rc-probe-out") / name if given is None else given_path(given, "--out")


def check_target(target: Path) -> None:
    """Find out before the measurement, not after it, that nothing can be written there."""
    check_folder(target, f"--out {target}")
