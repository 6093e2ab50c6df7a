"""Measure inside other tools: training loops, trackers, evaluation harnesses."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "CollapseEvaluator":  # its module imports sentence-transformers
        from .sentence_transformers import CollapseEvaluator

        return CollapseEvaluator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
