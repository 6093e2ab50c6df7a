"""What a probe found: tidy tables with what they were measured on, saved and loaded without loss."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from rc_probe.hooks.errors import RcProbeError
from rc_probe.options import in_python
from rc_probe.results.files import check_saved, plain, tidy
from rc_probe.results.saved import Stored

if TYPE_CHECKING:
    from rc_probe.results.checks import Outcome
    from rc_probe.results.tables import Table


@dataclass(eq=False, repr=False)
class ProbeResult(Stored):
    """The outcome of one probe.

    Parameters
    ----------
    model: what was probed: id, class, blocks, dim, …
    settings: what it was probed with: data, samples, length, dtype, seed, the command to repeat it, …
    environment: versions, platform, date, seconds
    tables: tidy frames by name (`residuals`, `ablations`, …), one row per number

    NaN and infinity become missing values here, once, so that what is saved is what was held.
    """

    stored: ClassVar[tuple[str, ...]] = ("model", "settings", "environment")
    called: ClassVar[str] = "a run"
    command: ClassVar[str] = "rc-probe MODEL"

    model: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    source: Path | None = field(default=None, init=False)  # the file that it was loaded from

    def __post_init__(self) -> None:
        self.model, self.settings, self.environment = map(
            plain, (self.model, self.settings, self.environment)
        )
        self.tables = {name: tidy(name, frame) for name, frame in self.tables.items()}

    def __repr__(self) -> str:
        tables = ", ".join(f"{name} ({len(frame)} rows)" for name, frame in self.tables.items())
        return f"<ProbeResult: {self.verdict['sentence']} Tables: {tables or 'none'}>"

    @cached_property
    def verdict(self) -> dict[str, Any]:
        """The finding in words and numbers, computed from the tables (see `rc_probe.results.verdict`)."""
        from rc_probe.measures import MEASUREMENTS
        from rc_probe.results.verdict import judge

        found = {each.name: each.findings(self) for each in MEASUREMENTS if each.has_findings}
        verdict: dict[str, Any] = plain(judge(self) | found)
        return verdict

    @property
    def declared(self) -> "Mapping[str, Table]":
        """What the columns of each table mean."""
        from rc_probe.measures import TABLES

        return TABLES

    def table(self, name: str) -> pd.DataFrame:
        """The table `name`; `RcProbeError` where this result has none of that name."""
        if name not in self.tables:
            raise RcProbeError(f"no table {name!r} in this result", todo=f"It has: {', '.join(self.tables)}")
        return self.tables[name]

    @property
    def residuals(self) -> pd.DataFrame:
        """Each metric by weights, variant and layer: mean, std (ddof 1), count, rounding floor."""
        return self.table("residuals")

    @property
    def ablations(self) -> pd.DataFrame:
        """Each ablation's value at the last layer beside the model's own: value, baseline, change."""
        return self.table("ablations")

    @property
    def importance(self) -> pd.DataFrame:
        """What the model loses without each part alone: value, baseline, change, its interval; proxies beside them."""
        return self.table("importance")

    @property
    def drops(self) -> pd.DataFrame:
        """What is left after so many removals, by method and half of the samples."""
        return self.table("drops")

    @property
    def recursion(self) -> pd.DataFrame:
        """The residual of pure attention below the float floor, by layer."""
        return self.table("recursion")

    @property
    def bounds(self) -> pd.DataFrame:
        """The one-layer bound and the unrolled bound of theorem 2.2 by layer, with their constants."""
        return self.table("bounds")

    @property
    def structure(self) -> pd.DataFrame:
        """The model's blocks, junctions and branches as they were found."""
        return self.table("structure")

    def fail_if(
        self,
        *conditions: Any,
        baseline: "str | os.PathLike[str] | ProbeResult | None" = None,
        max_drop: str | float | Sequence[str | float] | None = None,
    ) -> "list[Outcome]":
        """AssertionError where a condition such as `residual_bulk@last<0.1` holds; for tests of your own.

        Parameters
        ----------
        conditions: or lists of them: METRIC@WHERE[:VARIANT] OP NUMBER; WHERE is a layer, first, last, min, max or mean
        baseline: an earlier result on the same samples (or its folder), that no layer may fall below by
            more than max_drop: `0.05` (of the residual, the default), `"cosine=0.02"`, or several

        Returns what was found where every check passed. RcProbeError where one cannot be evaluated.
        """
        from rc_probe.results.checks import Checks, fail_if, flat

        loaded, name = baseline, "the baseline"
        if loaded is not None and not isinstance(loaded, ProbeResult):
            loaded, name = ProbeResult.load(loaded), str(loaded)
        try:
            return fail_if(self, Checks.of(flat(conditions), loaded, max_drop, name))
        except RcProbeError as error:
            raise in_python(error) from error

    def _render(self) -> str:
        from rc_probe.reports.pages.run import render

        return render(self)

    def _check_saved(self) -> None:
        check_saved(self)
