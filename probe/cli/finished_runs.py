"""Whether a run is there already: finished, by this version, with the same settings, of the same files."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rc_probe
from rc_probe.hooks.errors import RcProbeError

if TYPE_CHECKING:
    from rc_probe.result import ProbeResult

    from .job import Job


def asked(job: Job) -> dict[str, Any]:
    """What decides the numbers of a run: its settings, and the state of the files that it reads.

    A Hub model or dataset is told by its name and revision: that a branch moved is not seen.
    """
    from rc_probe.results.files import plain

    files = _files(job.settings.data)
    found: dict[str, Any] = plain(
        {
            "model": job.model,
            "model_files": _state(Path(job.model).expanduser(), below=False),
            "data_files": _state(Path(files).expanduser(), below=True) if files else None,
            **asdict(job.settings),
        }
    )
    return found


def finished(job: Job) -> ProbeResult | None:
    """The result in the job's folder, if the job would make the same again; its files are written last."""
    from rc_probe.result import ProbeResult
    from rc_probe.results.saving import is_whole

    try:
        result = ProbeResult.load(job.target)
    except RcProbeError:
        return None
    same = result.settings.get("asked") == asked(job)
    version = result.environment.get("rc_probe") == rc_probe.__version__
    whole = not interrupted(result)
    return result if same and whole and version and is_whole(job.target) else None


def placed(job: Job, *, chosen: bool, say: Callable[[str], None]) -> Job:
    """The job with a folder in which no run with other settings stands: NAME, else NAME-2, NAME-3 …

    A folder that was `chosen` by the user is theirs to replace, and a line says so.
    """
    wanted = _settings(asked(job))

    def ours(place: Path) -> bool:
        found = settings_in(place).get("asked")
        return found is None or _settings(found) == wanted

    place = job.target if chosen else free_folder(job.target, ours)
    if not ours(place):
        say(f"{place} holds a run with other settings, which this one replaces")
    if place != job.target:
        say(f"{job.target} holds a run with other settings; this one goes to {place}")
    return replace(job, target=place)


def free_folder(target: Path, ours: Callable[[Path], bool]) -> Path:
    """The folder NAME, else NAME-2, NAME-3 …: the first that is `ours` to write into."""
    numbered = (target.with_name(f"{target.name}-{number}") for number in itertools.count(2))
    return next(place for place in itertools.chain([target], numbered) if ours(place))


def settings_in(folder: Path) -> dict[str, Any]:
    """The settings of the result in a folder; {} where there is none."""
    from rc_probe.results.json_file import JSON_NAME, read_json

    try:
        found = read_json(folder / JSON_NAME)["settings"]
    except (RcProbeError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _settings(found: dict[str, Any]) -> dict[str, Any]:
    """Without the state of files: a model that was trained on is measured in the place of the old one."""
    return {key: value for key, value in found.items() if key not in ("model_files", "data_files")}


def interrupted(result: ProbeResult) -> list[str]:
    """Names of the measurements that an interrupt left out."""
    missing: dict[str, str] = result.settings.get("missing") or {}
    return [name for name, why in missing.items() if why == "interrupted"]


def _files(data: Any) -> str | None:
    """Where data may have files: of `lm-eval:TASK:FOLDER` the folder, whose tables may lie elsewhere."""
    if not isinstance(data, str):
        return None
    return data.split(":", 2)[2] if re.match("lm-eval:[^:]*:", data) else data


def _state(path: Path, *, below: bool) -> str | None:
    """Names, sizes and times of the files in a folder (and `below` it), or of a file; None where there is none."""
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(path.rglob("*") if below else path.glob("*"))
    total = hashlib.sha256()
    for file in files:
        if file.is_file():
            state = file.stat()
            total.update(f"{file.relative_to(path)} {state.st_size} {state.st_mtime_ns}\n".encode())
    return total.hexdigest()[:16]
