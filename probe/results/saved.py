"""What is saved as a folder, results.json with its tables and a report, and read back."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import pandas as pd

from rc_probe.hooks.errors import RcProbeError

from .files import as_json, frame_of, to_csv
from .json_file import HTML_NAME, JSON_NAME, SCHEMA, given_path, read_json, reading
from .saving import save_whole, write_files


class Saved(ABC):
    """A result: tables, JSON, a report."""

    if TYPE_CHECKING:  # fields of some, properties of others

        @property
        def tables(self) -> dict[str, pd.DataFrame]: ...

        @property
        def source(self) -> str | Path | None: ...  # the file that it was loaded from

    @abstractmethod
    def to_json(self, files: Mapping[str, str] | None = None) -> str:
        """All of it as JSON: floats at full precision, NaN never. files: digests of the files beside it."""

    @abstractmethod
    def _render(self) -> str:
        """The report."""

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as one self-contained page; written to `path` too where one is given."""
        with reading(self.source):
            html = self._render()
        if path is not None:
            target = given_path(path, "to_html")
            write_files(target.parent, {target.name: html})
        return html

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `results.json`, one CSV per table and `report.html` into `folder`, as a whole.

        results.json comes last: while it is there, all files are of this result. Tables of an earlier result in the same
        folder that this one lacks are removed. `RcProbeError` where the folder cannot be written, the disk is full, or a file
        of these names is there that rc-probe did not write.
        """
        tables = {f"{name}.csv": to_csv(frame) for name, frame in self.tables.items()}
        return save_whole(given_path(folder, "save"), tables | {HTML_NAME: self.to_html()}, self.to_json)


class Stored(Saved):
    """A result that is read back: its results.json holds the fields `stored`, the verdict and the tables.

    kind: what stands there for what it is, None for a run; called, command: the same for the reader, and what writes it
    """

    stored: ClassVar[tuple[str, ...]]
    kind: ClassVar[str | None] = None
    called: ClassVar[str]
    command: ClassVar[str]

    if TYPE_CHECKING:
        source: Path | None

        @property
        def verdict(self) -> dict[str, Any]: ...

    def to_json(self, files: Mapping[str, str] | None = None) -> str:
        """All of it as JSON: floats at full precision, NaN never. `columns` holds the tables' dtypes.

        files: digests of the files beside it, which then stand in it, too
        """
        kind = {} if self.kind is None else {"kind": self.kind}
        fields = {name: getattr(self, name) for name in self.stored}
        return as_json({"schema": SCHEMA, **kind, **fields, "verdict": self.verdict}, self.tables, files)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read back what `save` wrote, equal bit for bit.

        `path`: the folder, its `results.json`, or the `results.json.gz` that the report holds.
        """
        source, saved = _read_saved(path)
        kind = saved.get("kind")
        if kind != cls.kind:
            found = str(kind or "run")
            what = f"{'an' if found[:1] in 'aeiou' else 'a'} {found}, not {cls.called}"
            raise RcProbeError(what, where=str(source), todo=f"Give a folder that `{cls.command}` wrote")
        make: Any = cls
        with reading(source):
            result: Self = make(**{name: saved[name] for name in cls.stored}, tables=_tables(saved))
            result._check_saved()
            result.source = source
            _ = result.verdict
        return result

    def _check_saved(self) -> None:
        """Raises where what readers need is not as it was written."""


def _read_saved(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The results.json at `path`, the folder or the file itself, and what stands in it."""
    source = given_path(path, "load")
    with contextlib.suppress(OSError):  # reading it will say what is wrong
        source = source / JSON_NAME if source.is_dir() else source
    return source, read_json(source)


def _tables(saved: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """The tables of a results.json that was read, with the types that they had."""
    dtypes = saved.get("columns", {})
    return {name: frame_of(rows, dtypes.get(name)) for name, rows in saved["tables"].items()}
