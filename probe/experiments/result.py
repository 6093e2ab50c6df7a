"""What an experiment found: its claims and its numbers, saved and loaded without loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from rc_probe.results.files import plain, tidy
from rc_probe.results.saved import Stored
from rc_probe.results.tables import CLAIMS

if TYPE_CHECKING:
    from rc_probe.results.tables import Table


@dataclass(eq=False, repr=False)
class ExperimentResult(Stored):
    """One experiment, run with some seeds.

    experiment: name, title, source; settings: sizes, seeds, the command to repeat it, …
    tables: `claims`, and those of the experiment, each with the column `seed`
    """

    stored: ClassVar[tuple[str, ...]] = ("experiment", "settings", "environment")
    kind: ClassVar[str | None] = "experiment"
    called: ClassVar[str] = "an experiment"
    command: ClassVar[str] = "rc-probe experiment"

    experiment: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    source: Path | None = field(default=None, init=False)  # the file that it was loaded from

    def __post_init__(self) -> None:
        self.experiment, self.settings, self.environment = map(
            plain, (self.experiment, self.settings, self.environment)
        )
        self.tables = {name: tidy(name, frame) for name, frame in self.tables.items()}

    def __repr__(self) -> str:
        return f"<ExperimentResult: {self.verdict['sentence']}>"

    @property
    def claims(self) -> pd.DataFrame:
        """A row for each claim: claim, source, expected, measured, low, high, seeds, holds."""
        return self.tables["claims"]

    @cached_property
    def verdict(self) -> dict[str, Any]:
        """The finding in words and numbers, computed from the claims."""
        from rc_probe.results.findings.claim_words import judge_claims

        found: dict[str, Any] = plain(judge_claims(self.claims))
        return found

    @property
    def declared(self) -> Mapping[str, Table]:
        """What the columns of each table mean."""
        from . import experiment

        return {**CLAIMS, **{table.name: table for table in experiment(self.experiment["name"]).tables}}

    def _render(self) -> str:
        from rc_probe.reports.pages.experiment import render

        return render(self)
