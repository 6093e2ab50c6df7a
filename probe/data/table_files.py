"""The rows of local tables, jsonl to parquet, read as they are needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rc_probe.hooks.errors import RcProbeError
from rc_probe.models.libraries import first_line

from .delimited import delimited

Record = dict[str, Any]  # one row of a user's table
DELIMITED = {".csv": ",", ".tsv": "\t"}
CHUNK = 256  # rows of a table read at a time


def rows_of(path: Path) -> Iterator[Record]:
    """The rows of a table, by its suffix, one of `places.TABLES`. Raises RcProbeError, with the line where it can."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return json_lines(path)
    if suffix == ".json":
        return _json(path)
    return _table(path, suffix)


def readable(path: Path) -> str:
    """The text of a file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RcProbeError("not UTF-8 text", where=str(path), todo="Save it as UTF-8") from None
    except OSError as error:
        raise RcProbeError(f"cannot be read ({error.strerror})", where=str(path), todo="Check it") from None


def _table(path: Path, suffix: str) -> Iterator[Record]:
    try:
        if suffix == ".parquet":
            from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

            with ParquetFile(path) as table:
                for batch in table.iter_batches(batch_size=CHUNK):
                    yield from batch.to_pylist()
        else:
            yield from delimited(path, DELIMITED[suffix])
    except Exception as error:  # pyarrow has many
        what = f"not a readable {suffix[1:]} file ({first_line(error)})"
        raise RcProbeError(what, where=str(path), todo="Check the file") from error


def json_lines(path: Path) -> Iterator[Record]:
    """A row a line."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    yield _json_row(json.loads(line), path)
    except UnicodeDecodeError:
        raise RcProbeError("not UTF-8 text", where=str(path), todo="Save it as UTF-8") from None
    except RcProbeError:
        raise
    except (ValueError, RecursionError) as error:
        what = f"line {number} is not JSON ({first_line(error)})"
        raise RcProbeError(what, where=str(path), todo="Put one JSON object on each line") from None
    except OSError as error:
        raise RcProbeError(f"cannot be read ({error.strerror})", where=str(path), todo="Check it") from None


def _json(path: Path) -> Iterator[Record]:
    """A list of rows or of texts, one list per column, {"data": [rows]}, or jsonl."""
    text = readable(path)
    try:
        found = json.loads(text) if text.strip() else []
    except RecursionError as error:
        raise RcProbeError(
            f"not JSON ({first_line(error)})", where=str(path), todo="Check the file"
        ) from None
    except ValueError:
        yield from json_lines(path)
        return
    if isinstance(found, dict) and all(isinstance(values, list) for values in found.values()):
        columns = list(found.values())
        if len(columns) == 1 and all(isinstance(row, dict) for row in columns[0]):
            found = columns[0]
        else:
            found = [dict(zip(found, values, strict=False)) for values in zip(*columns, strict=False)]
    for row in found if isinstance(found, list) else [found]:
        yield _json_row(row, path)


def _json_row(row: Any, path: Path) -> Record:
    if isinstance(row, str):
        return {"text": row}
    if not isinstance(row, dict):
        todo = 'Make each row an object, such as {"text": "..."}'
        raise RcProbeError(f"a row is a {type(row).__name__}, not an object", where=str(path), todo=todo)
    return row
