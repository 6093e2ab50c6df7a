"""The models that rc-probe itself trains (`rc_probe.experiments`), so that their folders load like any other."""

from __future__ import annotations

from importlib import import_module
from typing import Any

KINDS = {"rc_probe_san": ("san", "SANForTokenClassification")}  # model type: file and class


def class_of(kind: str | None) -> Any:
    """The class of a model type of ours, known to transformers from now on; None for others."""
    if kind not in KINDS:
        return None
    file, name = KINDS[kind]
    return getattr(import_module(f"{__name__}.{file}"), name)
