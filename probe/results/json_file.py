"""results.json: read back, and what it says of the files beside it. No pandas here: the command reads it before any run."""

import contextlib
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rc_probe.hooks.errors import RcProbeError

SCHEMA = 1
JSON_NAME, HTML_NAME = "results.json", "report.html"
TABLE_NAME = re.compile(r"[a-z][a-z0-9_]*")  # a table's name is a file's name


def given_path(path: Any, where: str) -> Path:
    """The path that a caller gave. RcProbeError for what is none."""
    if not isinstance(path, str | os.PathLike):
        raise RcProbeError(f"{type(path).__name__} is no path", where=where, todo="Give a text or a Path")
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise RcProbeError(f"{text!r:.80} is no path", where=where, todo="Give a folder or a file")
    return Path(path)


@contextlib.contextmanager
def reading(source: str | Path | None) -> Iterator[None]:
    """Whatever goes wrong inside with what a file holds is one line; with results of this process (None) it is a fault."""
    try:
        yield
    except Exception as error:
        if source is None:
            raise
        what = f"the results are damaged ({type(error).__name__}: {str(error)[:200]})"
        raise RcProbeError(what, where=str(source), todo="Run the probe again") from error


def _refuse_constant(token: str) -> None:
    raise ValueError(f"{token} is not JSON")


def read_json(source: Path) -> dict[str, Any]:
    try:
        content = source.read_bytes()
        text = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        saved = json.loads(text, parse_constant=_refuse_constant)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise RcProbeError(f"damaged ({error})", where=str(source), todo="Download it again") from error
    except OSError as error:
        raise RcProbeError(
            f"cannot read the results ({error.strerror})",
            where=str(source),
            todo=f"Give a folder that rc-probe wrote, or its {JSON_NAME}",
        ) from error
    except (ValueError, RecursionError) as error:
        raise RcProbeError(
            f"not a file of results ({error})", where=str(source), todo=f"Give the {JSON_NAME} of a probe"
        ) from error
    if not isinstance(saved, dict) or saved.get("schema") != SCHEMA:
        schema = saved.get("schema") if isinstance(saved, dict) else None
        raise RcProbeError(
            f"schema {schema!r}, and this version reads schema {SCHEMA}",
            where=str(source),
            todo="Load it with the version of rc-probe that wrote it, or run the probe again",
        )
    return saved


def csv_names(source: Path) -> set[str]:
    """The CSV files of a results.json, none where it cannot be read."""
    try:
        names = read_json(source).get("tables", {})
    except RcProbeError:
        return set()
    return {f"{name}.csv" for name in names if TABLE_NAME.fullmatch(str(name))}
