"""The report: one HTML file that needs nothing else, made from a saved result."""

import base64
import gzip
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pandas as pd

from rc_probe.registry import METRICS, Metric
from rc_probe.reports.sections import SECTIONS
from rc_probe.reports.sections.section import shown
from rc_probe.reports.sections.view import View
from rc_probe.results.protocols import Result, Tables
from rc_probe.results.verdict import LEVELS
from rc_probe.results.words import THINGS, many, name_of, number

from .template import fill

# Bytes of table data inside the page, and of the page with them; what is larger stays in the files beside it.
MOST_EMBEDDED, MOST_PAGE = 168 * 1024, 490_000

LABELS = {
    "id": "model", "model_type": "architecture", "dim": "width", "signature": "block", "norm": "norms",
    "length": "tokens of a text at most", "tokens": "tokens measured", "truncated": "truncated samples",
    "svd_samples": "samples for SVD metrics", "init_seeds": "initialisations", "rc_probe": "rc-probe",
    "stacks": "other stacks", "modality": "kind of data", "seconds": "time (s)", "ablate": "ablations",
    "digest": "digest of the samples",
}  # fmt: skip


def _fact(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    return number(value, 3) if isinstance(value, float) else str(value)


def _facts(group: dict[str, Any], without: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Label and value of what is known, in the result's order."""
    return [
        (LABELS.get(key, key.replace("_", " ")), _fact(value))
        for key, value in group.items()
        if value is not None and value not in ("", []) and key not in without
    ]


def _strip(result: Result) -> list[str]:
    """The few facts that a reader needs before the figures."""
    model, settings = result.model, result.settings
    things = THINGS.get(str(settings.get("modality")), "texts")
    parts = [
        many(model["blocks"], "layers") if model.get("blocks") else "",
        f"width {model['dim']}" if model.get("dim") else "",
        f"{_count(model['parameters'])} parameters" if model.get("parameters") else "",
        many(settings["samples"], things) if settings.get("samples") else "",
        f"{settings['tokens']:,} tokens" if settings.get("tokens") else "",
        f"{settings['dtype']} on {settings.get('device', '?')}" if settings.get("dtype") else "",
        str(result.environment.get("date") or "")[:10],
    ]
    return [part for part in parts if part]


def _count(value: float) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,}"


@dataclass(frozen=True)
class Download:
    """A file of the result; `href` holds it where it is small enough to be inside the page."""

    name: str
    href: str | None


def downloads(result: Tables, room: int = MOST_EMBEDDED) -> list[Download]:
    """The CSV files and the JSON, the smallest ones inside the page as far as there is `room` (bytes)."""
    from rc_probe.results.files import to_csv
    from rc_probe.results.json_file import JSON_NAME

    links = {
        f"{name}.csv": "data:text/csv;charset=utf-8,"
        + quote(to_csv(frame), safe=" ,.:;+-_@/()|*=", errors="replace")
        for name, frame in result.tables.items()
    }
    inside = set()
    for name in sorted(links, key=lambda name: len(links[name])):
        room -= len(links[name])
        if room < 0:
            break
        inside.add(name)
    found = [Download(name, link if name in inside else None) for name, link in links.items()]
    packed = base64.b64encode(gzip.compress(result.to_json().encode(), mtime=0)).decode()
    if len(packed) > room:
        return [*found, Download(JSON_NAME, None)]
    return [*found, Download(f"{JSON_NAME}.gz", f"data:application/gzip;base64,{packed}")]


def _range(metric: Metric) -> str:
    ends = [("−∞", metric.low), ("∞", metric.high)]
    low, high = (unknown if end is None else f"{end:g}".replace("-", "−") for unknown, end in ends)
    return f"{low} to {high}"


def checks_of(frame: pd.DataFrame | None) -> list[tuple[str, str, str]]:
    """What was checked, as (level of the colour, verdict in a word, the rest of the line)."""
    words = {"True": ("healthy", "pass"), "False": ("collapsed", "fail")}
    rows = [] if frame is None else frame[["passed", "check", "said"]].astype(str).to_numpy().tolist()
    return [
        (*words.get(passed, ("watch", "not evaluated")), f"{check}: {said}") for passed, check, said in rows
    ]


def render(result: Result) -> str:
    """The page as text: the same result gives the same bytes."""
    verdict = result.verdict
    value = number(verdict["value"]) if verdict["value"] is not None else ""
    view = View(result)
    parts: dict[str, Any] = {
        "sections": shown(SECTIONS, view),
        "structure_table": view.whole("structure"),
        "name": name_of(result),
        "model": result.model,
        "settings": result.settings,
        "verdict": verdict,
        "shown": value,
        "checks": checks_of(result.tables.get("checks")),
        "rest": verdict["sentence"].removeprefix(value).strip(),
        "levels": LEVELS,
        "strip": _strip(result),
        "metrics": [(metric, _range(metric)) for name, metric in METRICS.items() if name in view.by_metric],
        "notes": [*result.model.get("notes", []), *result.settings.get("notes", [])],
        "model_facts": _facts(
            result.model, without=["proved", "notes", "block_digests", *(s.measurement for s in SECTIONS)]
        ),
        "setting_facts": _facts(result.settings, without=["command", "metrics", "notes", "asked"]),
        "environment_facts": _facts(result.environment),
    }
    bare = fill("run.html", **parts, downloads=[])
    room = min(MOST_PAGE - len(bare.encode(errors="replace")), MOST_EMBEDDED)
    return fill("run.html", **parts, downloads=downloads(result, room))
