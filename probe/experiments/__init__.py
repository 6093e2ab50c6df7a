"""The papers' experiments: small models trained in minutes, and what each claim comes to on this machine.

    found = rc_probe.experiments.run("sort", seeds=2, quick=True)
    found.claims                                  # claim, source, expected, measured, low, high, seeds, holds

The same from a terminal: `rc-probe experiment sort`. docs/experiments.md goes through the claims.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rc_probe.hooks.errors import RcProbeError

if TYPE_CHECKING:
    from .protocol import Experiment
    from .result import ExperimentResult

NAMES = {  # each is a file of that name
    "sort": "Sort 8 letters: what paths of each length are worth.",
    "hull": "Find the vertices of the convex hull of 10 points: the same of coordinates.",
    "memorize": "Learn labels of words by heart: the same of sentences, beside the ceiling.",
    "circle": "Two tokens go round a circle: what keeps them apart.",
    "nearest": "Nearest neighbours: heads of low rank, however many, against one of full rank.",
    "equilibria": "Norms and collapse where the answer is known. Nothing is trained.",
}

__all__ = ["NAMES", "ExperimentResult", "experiment", "run"]


def experiment(name: str) -> Experiment[Any]:
    """The experiment of that name; RcProbeError for a name that is none."""
    if name not in NAMES:
        raise unknown(name)
    found: Experiment[Any] = import_module(f"{__name__}.{name}").EXPERIMENT
    return found


def unknown(name: str) -> RcProbeError:
    """The refusal of a name that is none, with the nearest."""
    near = get_close_matches(str(name), NAMES, n=1)
    todo = f"Did you mean {near[0]}?" if near else f"There are {', '.join(NAMES)}"
    return RcProbeError(f"no experiment is called {name!r:.80}", where="experiment", todo=todo)


def __getattr__(name: str) -> Any:
    if name == "run":
        return import_module(f"{__name__}.runner").run
    if name == "ExperimentResult":
        return import_module(f"{__name__}.result").ExperimentResult
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
