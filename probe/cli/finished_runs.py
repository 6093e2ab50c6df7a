"""Whether a run is there already: finished, by this version, with the same settings, of the same files."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict
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
    from rc_probe.results.files import HTML_NAME

    try:
        result = ProbeResult.load(job.target)
    except RcProbeError:
        return None
    same = result.settings.get("asked") == asked(job)
    version = result.environment.get("rc_probe") == rc_probe.__version__
    whole = not interrupted(result)
    return result if same and whole and version and (job.target / HTML_NAME).is_file() else None


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
