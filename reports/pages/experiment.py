"""The report of an experiment: one HTML file, made from its claims and its numbers."""

from rc_probe.reports.sections.experiments import EXPERIMENT_SECTIONS
from rc_probe.reports.sections.experiments.view import ExperimentView
from rc_probe.reports.sections.section import shown
from rc_probe.results.protocols import Claiming
from rc_probe.results.words import many, number

from .run import downloads
from .template import fill


def _strip(result: Claiming) -> list[str]:
    """The few facts that a reader needs before the figures."""
    settings, environment = result.settings, result.environment
    parts = [
        str(result.experiment["source"]),
        many(settings["seeds"], "seeds"),
        "--quick" if settings.get("quick") else "",
        str(settings.get("device") or ""),
        f"{number(environment.get('seconds'), 3)} s" if environment.get("seconds") else "",
        str(environment.get("date") or "")[:10],
    ]
    return [part for part in parts if part]


def render(result: Claiming) -> str:
    """The page as text: the same result gives the same bytes."""
    return fill(
        "summary.html",
        kind="experiment",
        name=result.experiment["title"],
        strip=_strip(result),
        sentence=result.verdict["sentence"],
        reasons=result.verdict["reasons"],
        sections=shown(EXPERIMENT_SECTIONS, ExperimentView(result)),
        command=result.settings.get("command"),
        downloads=downloads(result),
    )
