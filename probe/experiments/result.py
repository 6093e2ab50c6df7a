"""What an experiment found: its claims and its numbers, saved and loaded without loss."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pandas as pd

from rc_probe.hooks.errors import RcProbeError
from rc_probe.results.files import as_json, plain, tidy
from rc_probe.results.json_file import SCHEMA, reading
from rc_probe.results.saved import Saved, read_saved, saved_tables
from rc_probe.results.tables import CLAIMS

if TYPE_CHECKING:
    from rc_probe.results.tables import Table

KIND = "experiment"


@dataclass(eq=False, repr=False)
class ExperimentResult(Saved):
    """One experiment, run with some seeds.

    experiment: name, title, source; settings: sizes, seeds, the command to repeat it, …
    tables: `claims`, and those of the experiment, each with the column `seed`
    """

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

    def to_json(self, files: Mapping[str, str] | None = None) -> str:
        """All of it as JSON: floats at full precision, NaN never. files: digests of the files beside it."""
        entries = {
            "schema": SCHEMA,
            "kind": KIND,
            "experiment": self.experiment,
            "settings": self.settings,
            "environment": self.environment,
            "verdict": self.verdict,
        }
        return as_json(entries, self.tables, files)

    def _render(self) -> str:
        from rc_probe.reports.pages.experiment import render

        return render(self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read back what `save` wrote. path: the folder, or its `results.json`."""
        source, saved = read_saved(path)
        if saved.get("kind") != KIND:
            todo = "Give what `rc-probe experiment` wrote"
            raise RcProbeError("not an experiment", where=str(source), todo=todo)
        with reading(source):
            result = cls(saved["experiment"], saved["settings"], saved["environment"], saved_tables(saved))
            result.source = source
        return result
