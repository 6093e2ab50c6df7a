"""The table of architectures that ships with the package: what is proved of which model type. `tests/census` makes it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rc_probe.hooks.errors import RcProbeError
from rc_probe.results.tables import Row

KEPT = Path(__file__).with_name("architectures.json")
STATUS = ("proved", "refused", "not run", "not built")
PATHS = "paths exact"


def load() -> dict[str, Any]:
    """The table that comes with the package: {"made", "versions", "rows"}."""
    document: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))
    return document


def select(rows: list[Row], text: str | None, status: str | None) -> list[Row]:
    """The rows whose model type or category holds `text`, and of that status."""
    if status and status not in STATUS:
        what = f"no such status {status!r}"
        raise RcProbeError(what, where="--status", todo=f"Choose one of {', '.join(STATUS)}")
    low = (text or "").lower().replace("-", "_")
    found = [
        row for row in rows if low in row["model_type"].lower().replace("-", "_") or low in row["category"]
    ]
    return [row for row in found if status in (None, row["status"])]


def counts(rows: list[Row]) -> list[tuple[str, Counter[str]]]:
    """(category, how many types of each status, and of PATHS), the largest category first; the last is the total."""
    categories = Counter(row["category"] for row in rows)
    each = [(c, _count(r for r in rows if r["category"] == c)) for c, _ in categories.most_common()]
    return [*each, ("total", _count(rows))]


def _count(rows: Iterable[Row]) -> Counter[str]:
    found: Counter[str] = Counter()
    for row in rows:
        found[row["status"]] += 1
        found[PATHS] += row["status"] == "proved" and row["paths_error"] is not None
    return found


def line(row: Row) -> tuple[str, ...]:
    """A row as it is shown: type, category, status, blocks, attention, paths, remarks."""
    others = [f"{s['stack']}: {s['signature']}" for s in row.get("stacks", [])[1:]]
    remarks = [*others, *row.get("peculiar", []), *filter(None, [row["reason"]])]
    return (
        row["model_type"], row["category"], row["status"], row.get("signature", ""), row.get("attention_op", ""),
        _paths(row), "; ".join(remarks),
    )  # fmt: skip


def _paths(row: Row) -> str:
    error = row.get("paths_error")
    return str(row.get("paths", "")) if error is None else f"{row['paths']} ({error:.0e})"
