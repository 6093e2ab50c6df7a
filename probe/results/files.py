"""Results in files: tables as JSON and CSV, saved and loaded without loss."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from rc_probe.hooks.errors import RcProbeError

from .json_file import TABLE_NAME
from .protocols import Result

KEPT: dict[str, dict[str, type]] = {  # of what readers use of a saved result
    "model": {"id": str, "class": str, "blocks": int, "parameters": int, "dim": int, "signature": str, "norm": str, "notes": list,
              "proved": list, "stacks": list, "revision": str, "stack": str, "paths": dict},
    "settings": {"data": str, "column": str, "label_column": str, "digest": str, "modality": str, "samples": int, "length": int,
                 "batch_size": int, "tokens": int, "truncated": int, "dtype": str, "device": str, "processes": int, "seed": int,
                 "init_seeds": int, "special_tokens": bool, "metrics": list, "svd_samples": int, "ablate": list, "notes": list,
                 "command": str, "missing": dict, "asked": dict},
    "environment": {"rc_probe": str, "torch": str, "transformers": str, "python": str, "platform": str, "date": str},
}  # fmt: skip
_DTYPE = re.compile(r"object|str|string|bool(ean)?|[uU]?[iI]nt\d{1,2}|[fF]loat\d{1,2}|datetime64\[\w{2}\]")


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: Python scalars, lists, dicts. A number that is not finite becomes None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [plain(item) for item in items]
    if value is pd.NA or value is pd.NaT:
        return None
    return str(value)


def tidy(name: str, frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with a plain index and no infinity: a number that overflowed is a missing number."""
    if not TABLE_NAME.fullmatch(name):
        raise RcProbeError(f"{name!r} cannot name a table", todo="Use lower-case letters, digits and _")
    frame = frame.reset_index(drop=True)
    floats = frame.select_dtypes("float").columns
    return frame.assign(**{column: frame[column].where(np.isfinite(frame[column])) for column in floats})


def _cells(column: pd.Series) -> list[Any]:
    cells, dtype = column.tolist(), column.dtype
    if isinstance(dtype, np.dtype) and dtype.kind == "f":
        return [cell if math.isfinite(cell) else None for cell in cells]
    return cells if isinstance(dtype, np.dtype) and dtype.kind in "biu" else [plain(cell) for cell in cells]


def to_csv(frame: pd.DataFrame) -> str:
    """The table as CSV: a header, then one line per row, floats at full precision, missing values empty.

    A text that a spreadsheet would take for a formula gets a ' in front.
    """
    texts = {
        str(name): frame[name].map(_no_formula) for name in frame if not is_numeric_dtype(frame[name].dtype)
    }
    return frame.assign(**texts).to_csv(index=False, lineterminator="\n")


def _no_formula(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def as_json(
    entries: Mapping[str, Any], tables: Mapping[str, pd.DataFrame], files: Mapping[str, str] | None
) -> str:
    """A results.json: its own entries, its tables, and the digests of the files beside it. NaN never."""
    document = {**entries, **_tables(tables), **({"files": dict(files)} if files else {})}
    return json.dumps(document, indent=1, allow_nan=False)


def _tables(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """`columns`, the tables' dtypes, and `tables`, their rows, as JSON can hold them."""
    return {
        "columns": {
            name: {str(column): str(frame[column].dtype) for column in frame}
            for name, frame in tables.items()
        },
        "tables": {name: _rows(frame) for name, frame in tables.items()},
    }


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    cells = [_cells(frame[column]) for column in frame]
    names = [str(column) for column in frame]
    return [dict(zip(names, row, strict=True)) for row in zip(*cells, strict=True)]


def check_saved(result: Result) -> None:
    """ValueError where what a file says is not of the types that all readers expect."""
    for part, types in KEPT.items():
        entries = getattr(result, part)
        for key, kind in types.items():
            value = entries.get(key)
            if value is not None and (
                not isinstance(value, kind) or (kind is int and isinstance(value, bool))
            ):
                raise ValueError(f"{part}.{key} is {value!r:.80}")
            if isinstance(value, list) and not all(isinstance(item, str) for item in value):
                raise ValueError(f"{part}.{key} holds more than texts")
    for name, frame in result.tables.items():
        for column in result.declared[name].columns if name in result.declared else ():
            cells = frame.get(column.name)
            if cells is None or cells.isna().all():
                continue
            if is_numeric_dtype(cells) != (column.dtype != "str"):
                raise ValueError(f"the column {name}.{column.name} is of another type")


def frame_of(rows: list[dict[str, Any]], dtypes: dict[str, str] | None) -> pd.DataFrame:
    """The frame of JSON rows; `dtypes` in the order of the columns, guessed by pandas where not given."""
    if dtypes is None:
        return pd.DataFrame(rows)
    for dtype in dtypes.values():
        if not _DTYPE.fullmatch(dtype):
            raise ValueError(f"no column is of the type {dtype!r:.80}")
    columns: dict[str, pd.Series] = {
        name: pd.Series([row[name] for row in rows], dtype=dtype) for name, dtype in dtypes.items()
    }
    return pd.DataFrame(columns)
