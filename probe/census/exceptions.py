"""What the general rules of sizes and classes cannot know: a row for each such type, with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """An exception: config values by dotted name, or the class to build."""

    reason: str
    config: Mapping[str, Any] = {}
    cls: str | None = None


EXCEPTIONS: dict[str, Row] = {}
