"""What a difference of two models is: one table with what it was measured on, saved and loaded without loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from rc_probe.hooks.errors import RcProbeError
from rc_probe.options import in_python
from rc_probe.results.files import plain, tidy
from rc_probe.results.saved import Stored
from rc_probe.results.tables import DIFFED

if TYPE_CHECKING:
    from rc_probe.results.checks import Outcome
    from rc_probe.results.tables import Table


@dataclass(eq=False, repr=False)
class DiffResult(Stored):
    """The difference of two models.

    a, b: what is known of them: name, id, class, blocks, dim, …; settings: data, samples, the command to repeat it,
    both models' predictions, …; tables: `differences`, and `checks` where something was checked
    """

    stored: ClassVar[tuple[str, ...]] = ("a", "b", "settings", "environment")
    kind: ClassVar[str | None] = "difference"
    called: ClassVar[str] = "a difference of two models"
    command: ClassVar[str] = "rc-probe diff"

    a: dict[str, Any]
    b: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    source: Path | None = field(default=None, init=False)  # the file that it was loaded from

    def __post_init__(self) -> None:
        self.a, self.b, self.settings, self.environment = map(
            plain, (self.a, self.b, self.settings, self.environment)
        )
        self.tables = {name: tidy(name, frame) for name, frame in self.tables.items()}

    def __repr__(self) -> str:
        return f"<DiffResult: {self.verdict['sentence']}>"

    @cached_property
    def verdict(self) -> dict[str, Any]:
        """The finding in words and numbers, computed from the table."""
        from rc_probe.results.findings.difference_words import judge_difference

        found: dict[str, Any] = plain(judge_difference(self))
        return found

    @property
    def declared(self) -> Mapping[str, Table]:
        """What the columns of each table mean."""
        return DIFFED

    @property
    def differences(self) -> pd.DataFrame:
        """The numbers: component, block, layer, metric, mean, std, count."""
        return self.tables["differences"]

    def fail_if(self, *conditions: Any) -> list[Outcome]:
        """AssertionError where a condition such as `difference_bulk@max>0.05` holds; for tests of your own.

        Conditions: METRIC[@WHERE][:COMPONENT] OP NUMBER, as in docs/diff.md. Returns what was found where all passed;
        RcProbeError where one cannot be evaluated.
        """
        from rc_probe.results.checks import flat, passed_all

        from .checks import DiffChecks

        try:
            return passed_all(DiffChecks.of(flat(conditions)).evaluate(self))
        except RcProbeError as error:
            raise in_python(error) from error

    def _render(self) -> str:
        from rc_probe.reports.pages.difference import render

        return render(self)
