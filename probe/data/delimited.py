"""Rows of csv and tsv files as their authors meant them, or refused with the line: never one row more or less than there is."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

LARGEST = 2**31 - 1  # characters of a cell; Python's own limit is 131,072
QUOTED_LINES = 1000  # of one row of a tsv file
_NUMBER = re.compile(r"[+-]?(\d{1,18}|(\d+\.\d*|\.?\d+)([eE][+-]?\d+)?)")


class _Reader:
    """Rows of a file by their cells. line: where the last one began, from 1."""

    def __init__(self, file: TextIO, delimiter: str) -> None:
        self.file, self.delimiter = file, delimiter
        self.ahead: list[str] = []  # lines that were looked at and not taken
        self.line, self.next = 0, 1
        self.width: int | None = None  # cells of the header

    def _peek(self, number: int) -> str | None:
        while len(self.ahead) <= number and (line := self.file.readline()):
            self.ahead.append(line)
        return self.ahead[number] if number < len(self.ahead) else None

    def row(self) -> list[str] | None:
        """The next row that is not blank; None at the end. ValueError where it cannot be meant."""
        while (line := self._peek(0)) is not None and not line.strip("\r\n"):
            self._take(1)
        if line is None:
            return None
        self.line = self.next
        cells, lines = self._meant(line)
        self._take(lines)
        self.width = self.width or len(cells)
        return cells

    def _take(self, lines: int) -> None:
        del self.ahead[:lines]
        self.next += lines

    def _meant(self, line: str) -> tuple[list[str], int]:
        """(cells, how many lines they take). In tsv files a quote may be a letter like any other."""
        split = self._split(line)
        plain = self._fitting(split)
        if plain is not None and not any(cell.startswith('"') for cell in split):
            return plain, 1
        quoted, lines, why = self._quoted()
        if self.delimiter == "\t" and plain is not None:
            if quoted is None:
                return plain, 1
            if lines > 1 and all(self._fitting(self._split(one)) for one in self.ahead[:lines]):
                raise ValueError("a cell begins with a quote, and this can be read as one row or as several")
        if quoted is None:
            raise ValueError(why)
        return quoted, lines

    def _split(self, line: str) -> list[str]:
        return line.rstrip("\r\n").split(self.delimiter)

    def _quoted(self) -> tuple[list[str] | None, int, str]:
        """The row with its quotes read: (cells or None, how many lines, why not)."""
        used = 0

        def lines() -> Iterator[str]:
            nonlocal used
            while used < QUOTED_LINES and (line := self._peek(used)) is not None:
                used += 1
                yield line

        try:
            cells = next(csv.reader(lines(), delimiter=self.delimiter, strict=True))
        except (csv.Error, StopIteration) as error:
            return None, used, str(error)
        fitting = self._fitting(cells)
        return fitting, used, f"{len(cells)} cells, and the header has {self.width}"

    def _fitting(self, cells: list[str]) -> list[str] | None:
        """As many cells as the header has, without empty ones behind a last delimiter; None where they are not."""
        if self.width is None or len(cells) == self.width:
            return cells
        behind = cells[self.width :]
        return cells[: self.width] if len(cells) > self.width and not any(behind) else None


def delimited(path: Path, delimiter: str) -> Iterator[dict[str, str]]:
    """The rows by the names of their columns. Raises ValueError with the line, UnicodeDecodeError, OSError."""
    before = csv.field_size_limit(LARGEST)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = _Reader(file, delimiter)
            try:
                names = reader.row()
                if names is None:
                    return
                _check_names(names, delimiter)
                while (cells := reader.row()) is not None:
                    yield dict(zip(names, cells, strict=True))
            except UnicodeDecodeError:
                raise
            except ValueError as error:
                raise ValueError(f"line {reader.line}: {error}") from None
    finally:
        csv.field_size_limit(before)


def _check_names(names: list[str], delimiter: str) -> None:
    other = next(
        (sign for sign in ";\t|" if sign != delimiter and len(names) == 1 and sign in names[0]), None
    )
    if other is not None:
        raise ValueError(f"the header is separated by {other!r}, not by {delimiter!r}")
    twice = [name for place, name in enumerate(names) if name and name in names[:place]]
    if twice:
        raise ValueError(f"two columns are called {twice[0]!r}")


def numbers_of(column: list[str | None]) -> list[str | float | None]:
    """A column of such a file: numbers where all its cells are numbers or empty, else texts."""
    if not all(cell is None or is_number(cell) for cell in column):
        return list(column)
    return [None if cell is None else _number(cell) for cell in column]


def is_number(cell: str) -> bool:
    return _NUMBER.fullmatch(cell.strip()) is not None


def _number(cell: str) -> float:
    return int(cell) if cell.strip().lstrip("+-").isdecimal() else float(cell)
