"""A result saved as a whole: either all files of a folder belong together, or there is no results.json in it.

What is new is written beside its place first; then the old results.json goes, everything else is moved over, and the new
results.json comes last, with a digest of each of the other files. One writer at a time: a lock for each folder.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rc_probe.hooks.errors import RcProbeError

from .json_file import HTML_NAME, JSON_NAME, csv_names, read_json

_PART = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.part")  # what a save writes beside the place of NAME
TRY = "try"  # the NAME of what only finds out whether something can be written
BEGINS = re.compile(rb'\{\s*"schema":')  # every results.json
TODO = "Free some space or give another folder with --out"


def save_whole(
    folder: str | os.PathLike[str], files: Mapping[str, str], as_json: Callable[[dict[str, str]], str]
) -> Path:
    """Save `files` by name, and results.json, which `as_json` makes of their digests. Returns the folder.

    Files of an earlier result that this one lacks are removed, as is what a killed save left behind.
    Raises RcProbeError where something that rc-probe did not write would be overwritten, and where nothing can be written.
    """
    home = Path(folder)
    whole = dict(files) | {JSON_NAME: as_json({name: digest(text) for name, text in files.items()})}
    with _errors(home), _lock(home):
        _refuse_foreign(home, whole)
        home.mkdir(parents=True, exist_ok=True)
        left = _leftovers(home)
        known = [home / JSON_NAME, *(path for path in left if path.name.startswith(f".{JSON_NAME}."))]
        stale = set().union(*map(csv_names, known)) - set(whole)
        fresh = _written(home, whole)
        try:
            if (home / JSON_NAME).exists():  # from here to the end there is no result
                aside = _beside(home, JSON_NAME)  # but what tells which files are of the old one
                os.replace(home / JSON_NAME, aside)
                left.append(aside)
            for name in stale:
                (home / name).unlink(missing_ok=True)
            for name in sorted(whole, key=lambda name: name == JSON_NAME):
                os.replace(fresh[name], home / name)
        finally:
            _drop([*fresh.values(), *(left if (home / JSON_NAME).exists() else ())])
    return home


def write_files(home: Path, files: Mapping[str, str]) -> None:
    """Write single files, none half-written: beside their places first, then moved over them."""
    with _errors(home), _lock(home):
        home.mkdir(parents=True, exist_ok=True)
        fresh = _written(home, files)
        try:
            for name in files:
                os.replace(fresh[name], home / name)
        finally:
            _drop(fresh.values())


def is_whole(folder: Path) -> bool:
    """Whether the folder holds a result whose files are all there, as they were saved."""
    try:
        digests = read_json(folder / JSON_NAME).get("files")
        return isinstance(digests, dict) and all(
            digest((folder / name).read_text("utf-8", "surrogateescape")) == one
            for name, one in digests.items()
        )
    except (OSError, ValueError):
        return False


def check_folder(folder: Path, where: str, names: Sequence[str] = (JSON_NAME, HTML_NAME)) -> None:
    """Find out before the measurement that `names` cannot be written there; leaves nothing behind.

    What is missing of the folder is made for a moment under a name of its own: another run may be about to use the real one.
    """
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    tried = _beside(there, TRY)
    try:
        if there == folder and folder.is_file():
            raise RcProbeError(f"{folder} is a file", where=where, todo="Give a folder")
        _refuse_foreign(folder, names)
        if there == folder:
            tried.write_bytes(b"")
        else:
            (tried / folder.relative_to(there)).mkdir(parents=True)
    except OSError as error:
        what = f"it cannot be written ({error.strerror or type(error).__name__})"
        raise RcProbeError(what, where=where, todo="Give another folder") from error
    finally:
        if there == folder:
            _drop([tried])
        else:
            shutil.rmtree(tried, ignore_errors=True)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def ours(folder: Path) -> bool:
    """Whether rc-probe has written into this folder: a result, be it damaged, or what a killed save left of one."""
    begins = _begins(folder)
    if begins is None and any(not path.name.startswith(f".{TRY}.") for path in _leftovers(folder)):
        return True
    return bool(_begins(folder) if begins is None else begins)  # a save may have ended since


def _begins(folder: Path) -> bool | None:
    """Whether its results.json begins as one of ours; None where there is none."""
    with contextlib.suppress(OSError), (folder / JSON_NAME).open("rb") as file:
        return BEGINS.match(file.read(100)) is not None
    return None


def _leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.glob(".*.part") if _PART.fullmatch(path.name)] if folder.is_dir() else []


def _refuse_foreign(home: Path, names: Iterable[str]) -> None:
    there = [name for name in names if (home / name).exists()]
    if there and not ours(home):
        what = f"{there[0]} is there already, and rc-probe did not write it"
        raise RcProbeError(what, where=str(home), todo="Give another folder with --out, or move it away")


def _written(home: Path, files: Mapping[str, str]) -> dict[str, Path]:
    """All files beside their places, by name."""
    fresh: dict[str, Path] = {}
    try:
        for name, text in files.items():
            target = home / name
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder has its name", str(target))
            fresh[name] = _beside(home, name)
            fresh[name].write_bytes(text.encode("utf-8", "backslashreplace"))
    except BaseException:
        _drop(fresh.values())
        raise
    return fresh


def _beside(home: Path, name: str) -> Path:
    return home / f".{name}.{uuid.uuid4().hex}.part"


def _drop(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _errors(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"cannot write the results ({error.strerror or error})"
        raise RcProbeError(what, where=str(error.filename or home), todo=TODO) from error


@contextlib.contextmanager
def _lock(home: Path) -> Iterator[None]:
    """One writer of a folder at a time. The lock lies among the temporary files, not in the folder."""
    from filelock import FileLock

    name = hashlib.sha256(str(home.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    locks = Path(tempfile.gettempdir()) / f"rc-probe-{getpass.getuser()}"
    locks.mkdir(exist_ok=True)
    with FileLock(locks / f"{name}.lock"):
        yield
