"""A difference of two models as the sections of its page read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from rc_probe.results.findings.difference_words import by_place
from rc_probe.results.protocols import Differing


@dataclass(frozen=True)
class DiffView:
    """One difference. a, b: the names of the models."""

    result: Differing

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The table `differences`, all its columns there."""
        return self.result.declared["differences"].read(self.result.tables)

    @property
    def a(self) -> str:
        return str(self.result.a.get("name"))

    @property
    def b(self) -> str:
        return str(self.result.b.get("name"))

    @property
    def threshold(self) -> float:
        return float(self.result.settings["threshold"])

    def curve(self, component: str, metric: str) -> dict[int, float]:
        """A metric by layer of the stream, or by block; empty where it was not measured."""
        return by_place(self.frame, component, metric)

    def spread(self, component: str, metric: str) -> Mapping[int, Any]:
        """Its standard deviations over samples, as far as they are known."""
        rows = self.frame[(self.frame["component"] == component) & (self.frame["metric"] == metric)]
        places = rows["layer" if component == "stream" else "block"]
        return {int(at): std for at, std in zip(places, rows["std"], strict=True)}

    @property
    def predictions(self) -> dict[str, Any]:
        """What both predict: task, samples, and of each metric both values."""
        return self.result.settings.get("predictions") or {}
