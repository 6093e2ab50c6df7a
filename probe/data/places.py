"""Where data may lie. No torch here: a path that is misspelt is known before a model is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rc_probe.hooks.errors import RcProbeError

TEXT_FILES = {".txt", ".text", ".md"}
TABLES = {".jsonl", ".json", ".csv", ".tsv", ".parquet"}
SOUNDS = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff"}
IMAGES = {  # those that Pillow decodes by itself; it also knows the names of pdf, eps, h5 and mpeg
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".pnm", ".tga", ".ico", ".jp2", ".j2k", ".avif", ".qoi", ".pcx", ".sgi",
}  # fmt: skip


def check_place(spec: Any) -> None:
    """RcProbeError for the name of a file or folder that is not there, or is neither; any other spec is left alone."""
    if not isinstance(spec, str | os.PathLike):
        return
    spec = os.fspath(spec)
    if not isinstance(spec, str) or spec.startswith("lm-eval:"):
        return
    try:
        path = Path(spec).expanduser()
        there, either = path.exists(), path.is_file() or path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, an unknown ~user, a null byte
        why = getattr(error, "strerror", None) or error
        raise RcProbeError(f"no path ({why})", where=f"{spec:.80}", todo="Check the path") from None
    if there and not either:
        raise RcProbeError("neither a file nor a folder", where=spec, todo="Give a file or a folder")
    named = path.suffix.lower() in TEXT_FILES | TABLES | SOUNDS | IMAGES
    if not there and (named or spec.startswith((".", "/", "~")) or spec.count("/") > 1):
        what = "no such file" if named else "no such file or folder"
        raise RcProbeError(what, where=spec, todo="Check the path")


def files_below(path: Path, suffixes: set[str]) -> list[Path]:
    """The files of these kinds in a folder and below, in order; or the one file. RcProbeError for a link to nothing."""
    found = []
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.suffix.lower() not in suffixes or file.name.startswith("."):
            continue
        if file.is_symlink() and not file.exists():
            raise RcProbeError("a link to a file that is not there", where=str(file), todo="Remove it")
        if file.is_file():  # not a folder, a pipe or a device of that name
            found.append(file)
    return found
