"""What a probe found: tidy tables with what they were measured on, saved and loaded without loss."""

import contextlib
import errno
import gzip
import json
import math
import os
import re
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd

from rc_probe.hooks.errors import RcProbeError

if TYPE_CHECKING:
    from .checks import Outcome

SCHEMA = 1
JSON_NAME, HTML_NAME = "results.json", "report.html"
_TABLE_NAME = re.compile(r"[a-z][a-z0-9_]*")  # a table's name is a file's name


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
    if not _TABLE_NAME.fullmatch(name):
        raise RcProbeError(f"{name!r} cannot name a table", todo="Use lower-case letters, digits and _")
    frame = frame.reset_index(drop=True)
    floats = frame.select_dtypes("float").columns
    return frame.assign(**{column: frame[column].where(np.isfinite(frame[column])) for column in floats})


def _cells(column: pd.Series) -> list[Any]:
    return [plain(cell) for cell in column.astype(object).where(column.notna(), None)]


@dataclass(eq=False, repr=False)
class ProbeResult:
    """The outcome of one probe.

    Parameters
    ----------
    model: what was probed: id, class, blocks, dim, …
    settings: what it was probed with: data, samples, length, dtype, seed, the command to repeat it, …
    environment: versions, platform, date, seconds
    tables: tidy frames by name (`residuals`, `ablations`, …), a row a number

    NaN and infinity become missing values here, once, so that what is saved is what was held.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model, self.settings, self.environment = map(
            plain, (self.model, self.settings, self.environment)
        )
        self.tables = {name: tidy(name, frame) for name, frame in self.tables.items()}

    def __repr__(self) -> str:
        tables = ", ".join(f"{name} ({len(frame)} rows)" for name, frame in self.tables.items())
        return f"<ProbeResult: {self.verdict['sentence']} Tables: {tables or 'none'}>"

    @cached_property
    def verdict(self) -> dict[str, Any]:
        """The finding in words and numbers, computed from the tables (see `rc_probe.reports.verdict`)."""
        from rc_probe.reports.verdict import judge

        found: dict[str, Any] = plain(judge(self))
        return found

    def table(self, name: str) -> pd.DataFrame:
        """The table `name`; `RcProbeError` where this result has none of that name."""
        if name not in self.tables:
            raise RcProbeError(f"no table {name!r} in this result", todo=f"It has: {', '.join(self.tables)}")
        return self.tables[name]

    @property
    def residuals(self) -> pd.DataFrame:
        """Each metric by weights, variant and layer: mean, std (ddof 1), count, rounding floor."""
        return self.table("residuals")

    @property
    def ablations(self) -> pd.DataFrame:
        """Each ablation's value at the last layer beside the model's own: value, baseline, change."""
        return self.table("ablations")

    @property
    def recursion(self) -> pd.DataFrame:
        """The residual of pure attention below the float floor, by layer."""
        return self.table("recursion")

    @property
    def bounds(self) -> pd.DataFrame:
        """The bound of theorem 2.2 by layer, with its constants."""
        return self.table("bounds")

    @property
    def structure(self) -> pd.DataFrame:
        """The model's blocks, junctions and branches as they were found."""
        return self.table("structure")

    def fail_if(
        self,
        *conditions: str,
        baseline: "str | os.PathLike[str] | ProbeResult | None" = None,
        max_drop: str | float | Sequence[str | float] | None = None,
    ) -> "list[Outcome]":
        """AssertionError where a condition such as `residual@last<0.1` holds; for tests of your own.

        Parameters
        ----------
        conditions: METRIC@WHERE[:VARIANT] OP NUMBER; WHERE is a layer, first, last, min, max or mean
        baseline: an earlier result on the same samples (or its folder), that no layer may fall below by
            more than max_drop: `0.05` (of the residual, the default), `"cosine=0.02"`, or several

        Returns what was found where every check passed. RcProbeError where one cannot be evaluated.
        """
        from .checks import fail_if

        return fail_if(self, conditions, baseline, max_drop)

    def to_json(self) -> str:
        """All of it as JSON: floats at full precision, NaN never. `columns` holds the tables' dtypes."""
        return json.dumps(
            {
                "schema": SCHEMA,
                "model": self.model,
                "settings": self.settings,
                "environment": self.environment,
                "verdict": self.verdict,
                **tables_as_json(self.tables),
            },
            indent=1,
            allow_nan=False,
        )

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as one self-contained page; written to `path` too where one is given."""
        from rc_probe.reports.page import render

        html = render(self)
        if path is not None:
            target = Path(path)
            write_files(target.parent, {target.name: html})
        return html

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `results.json`, one CSV per table and `report.html` into `folder`, none half-written.

        Tables of an earlier result in the same folder that this one lacks are removed.
        `RcProbeError` where the folder cannot be written or the disk is full.
        """
        return save_files(folder, self.tables, {HTML_NAME: self.to_html(), JSON_NAME: self.to_json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read back what `save` wrote, equal bit for bit.

        `path`: the folder, its `results.json`, or the `results.json.gz` that the report holds.
        """
        source = Path(path)
        source = source / JSON_NAME if source.is_dir() else source
        saved = _read(source)
        if saved.get("kind") == "comparison":
            todo = "Give one of the runs that it compares"
            raise RcProbeError("a comparison, not a run", where=str(source), todo=todo)
        try:
            tables = {
                name: _frame(rows, saved.get("columns", {}).get(name))
                for name, rows in saved["tables"].items()
            }
            return cls(saved["model"], saved["settings"], saved["environment"], tables)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RcProbeError(
                f"the results are damaged ({type(error).__name__}: {error})",
                where=str(source),
                todo="Run the probe again",
            ) from error


def to_csv(frame: pd.DataFrame) -> str:
    """The table as CSV: a header, then a line a row, floats at full precision, missing values empty."""
    return frame.to_csv(index=False, lineterminator="\n")


def tables_as_json(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """`columns`, the tables' dtypes, and `tables`, their rows, as JSON can hold them."""
    return {
        "columns": {
            name: {str(column): str(frame[column].dtype) for column in frame}
            for name, frame in tables.items()
        },
        "tables": {name: _rows(frame) for name, frame in tables.items()},
    }


def save_files(
    folder: str | os.PathLike[str], tables: Mapping[str, pd.DataFrame], files: Mapping[str, str]
) -> Path:
    """Write `files` and one CSV per table into `folder`, none half-written; CSVs of an earlier result go."""
    home = Path(folder)
    everything = {f"{name}.csv": to_csv(frame) for name, frame in tables.items()} | dict(files)
    stale = _csv_names(home) - set(everything)
    write_files(home, everything)
    for name in stale:
        (home / name).unlink(missing_ok=True)
    return home


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    cells = [_cells(frame[column]) for column in frame]
    names = [str(column) for column in frame]
    return [dict(zip(names, row, strict=True)) for row in zip(*cells, strict=True)]


def _frame(rows: list[dict[str, Any]], dtypes: dict[str, str] | None) -> pd.DataFrame:
    """The frame of JSON rows; `dtypes` in the order of the columns, guessed by pandas where not given."""
    if dtypes is None:
        return pd.DataFrame(rows)
    columns: dict[str, pd.Series] = {
        name: pd.Series([row[name] for row in rows], dtype=dtype) for name, dtype in dtypes.items()
    }
    return pd.DataFrame(columns)


def _refuse_constant(token: str) -> None:
    raise ValueError(f"{token} is not JSON")


def _read(source: Path) -> dict[str, Any]:
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


def _csv_names(home: Path) -> set[str]:
    """The CSV files of the result that stands in `home`, none where there is no readable one."""
    try:
        names = _read(home / JSON_NAME).get("tables", {})
    except RcProbeError:
        return set()
    return {f"{name}.csv" for name in names if _TABLE_NAME.fullmatch(str(name))}


def write_files(home: Path, files: Mapping[str, str]) -> None:
    """Write `files` into `home`: all beside their places first, then moved over them."""
    fresh: dict[Path, Path] = {}
    try:
        home.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            target = home / name
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder has its name", str(target))
            part = home / f".{name}.{uuid.uuid4().hex}.part"
            fresh[part] = target
            part.write_bytes(text.encode("utf-8", "backslashreplace"))
        for part, target in fresh.items():
            os.replace(part, target)
    except OSError as error:
        raise RcProbeError(
            f"cannot write the results ({error.strerror or error})",
            where=str(error.filename or home),
            todo="Free some space or give another folder with --out",
        ) from error
    finally:
        for part in fresh:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
