"""The report of two models: one HTML file, made from their difference."""

from rc_probe.reports.sections.differences import DIFF_SECTIONS
from rc_probe.reports.sections.differences.view import DiffView
from rc_probe.reports.sections.section import shown
from rc_probe.results.protocols import Differing
from rc_probe.results.words import THINGS, many

from .run import checks_of, downloads
from .template import fill


def _strip(result: Differing) -> list[str]:
    """The few facts that a reader needs before the figures."""
    a, b, settings = result.a, result.b, result.settings
    depths, widths = ({int(one[key]) for one in (a, b) if one.get(key)} for key in ("blocks", "dim"))
    parts = [
        f"{' and '.join(map(str, sorted(depths)))} blocks" if depths else "",
        f"width {' and '.join(map(str, sorted(widths)))}" if widths else "",
        many(settings["samples"], THINGS.get(str(settings.get("modality")), "texts")),
        f"{settings['tokens']:,} tokens" if settings.get("tokens") else "",
        str(result.environment.get("date") or "")[:10],
    ]
    return [part for part in parts if part]


def render(result: Differing) -> str:
    """The page as text: the same result gives the same bytes."""
    return fill(
        "difference.html",
        name=f"{result.b.get('name')} beside {result.a.get('name')}",
        strip=_strip(result),
        sentence=result.verdict["sentence"],
        reasons=result.verdict["reasons"],
        checks=checks_of(result.tables.get("checks")),
        sections=shown(DIFF_SECTIONS, DiffView(result)),
        notes=result.settings.get("notes") or [],
        command=result.settings.get("command"),
        downloads=downloads(result),
    )
