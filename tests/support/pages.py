"""Pages where they are not what is tested, and the marks of figures where they are."""

import sys
import xml.etree.ElementTree as ET
from importlib import import_module

import pytest

FIGURES = {  # what draws on which page
    "run": ("residual_figure", "recursion_figure", "metrics_figure", "ablation_figure"),
    "massive": ("massive_figure",),
    "paths": ("effect_figure", "lengths_figure", "chains_figure"),
    "comparison": ("curves_figure", "changes_figure", "training_figures"),
}


@pytest.fixture
def no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without figures, which are nearly all that a page costs (1 to 4 seconds).

    `@pytest.mark.figures("comparison")`: but for the figures of these.
    """
    marker = request.node.get_closest_marker("figures")
    for page in ("run", "comparison"):
        import_module(f"rc_probe.reports.pages.{page}")
    shown = [module for name, module in list(sys.modules.items()) if name.startswith("rc_probe.reports.")]
    for page in FIGURES.keys() - set(marker.args if marker else ()):
        for figure in FIGURES[page]:
            users = [module for module in shown if hasattr(module, figure)]
            assert users, f"{figure} has another name"
            nothing = [] if figure.endswith("s") else None
            for module in users:
                monkeypatch.setattr(module, figure, lambda *_, nothing=nothing, **__: nothing)


def fills(element: ET.Element, fill: str = "") -> list[tuple[str, str]]:
    """The title and the fill of each mark below an element."""
    fill = element.get("fill", fill)
    if element.tag in ("use", "path") and element.find("title") is not None:
        return [(element.findtext("title", ""), fill)]
    return [found for child in element for found in fills(child, fill)]
