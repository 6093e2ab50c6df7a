"""What is saved as a folder, results.json with its tables and a report, and read back."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .files import frame_of, to_csv
from .json_file import HTML_NAME, JSON_NAME, given_path, read_json, reading
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


def read_saved(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The results.json at `path`, the folder or the file itself, and what stands in it."""
    source = given_path(path, "load")
    with contextlib.suppress(OSError):  # reading it will say what is wrong
        source = source / JSON_NAME if source.is_dir() else source
    return source, read_json(source)


def saved_tables(saved: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """The tables of a results.json that was read, with the types that they had."""
    dtypes = saved.get("columns", {})
    return {name: frame_of(rows, dtypes.get(name)) for name, rows in saved["tables"].items()}
