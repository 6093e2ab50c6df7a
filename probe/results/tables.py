"""The tables of a result: one row for each number."""

from typing import Any

Row = dict[str, Any]  # a cell for each column
