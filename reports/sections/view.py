"""Results as the sections of their page read them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from rc_probe.registry import WHOLE
from rc_probe.reports import table_cells
from rc_probe.results.curves import Curve, Curves, curves_by_metric, headline
from rc_probe.results.protocols import Compared, Result
from rc_probe.results.tables import Table


@dataclass(frozen=True)
class View:
    """One result. Its curves are derived once, its tables have all the columns that are declared for them."""

    result: Result

    @cached_property
    def by_metric(self) -> Mapping[str, Curves]:
        """The curves of every metric that was measured."""
        return curves_by_metric(self.result)

    @property
    def metric(self) -> str:
        """The metric that speaks for the model."""
        return headline(self.by_metric)

    def curves(self, metric: str | None = None) -> Curves:
        """The curves of one metric (None: of the headline) by weights and variant; none where it was not measured."""
        return self.by_metric.get(metric or self.metric, {})

    def same(self, one: str, other: str) -> bool:
        """Whether two metrics have the same values everywhere, both measured for the same curves."""
        first, second = self.curves(one), self.curves(other)
        return first.keys() == second.keys() and all(
            (curve.layers, curve.means) == (second[key].layers, second[key].means)
            for key, curve in first.items()
        )

    def declared(self, name: str) -> Table:
        """The title and the columns of a table."""
        return self.result.declared[name]

    def table(self, name: str) -> pd.DataFrame:
        """A table with all its columns; no rows where it was not measured."""
        return self.declared(name).read(self.result.tables)

    def whole(self, name: str) -> table_cells.Table | None:
        """A table for reading, as it was measured; None without rows."""
        return table_cells.whole_table(self.declared(name), self.result.tables.get(name))

    def found(self, measurement: str) -> dict[str, Any]:
        """What the verdict says of a measurement: `sentence`, `reasons`, …; nothing where it says nothing."""
        return self.result.verdict.get(measurement) or {}


@dataclass(frozen=True)
class ComparedView:
    """Several results. Their curves are derived once."""

    comparison: Compared

    @cached_property
    def _by_run(self) -> Mapping[str, Mapping[str, Curves]]:
        return {run.name: curves_by_metric(run.result) for run in self.comparison.runs}

    def whole(self, metric: str) -> dict[str, Curve]:
        """The curve of the whole model with pretrained weights by run, of the runs that have one."""
        found = {name: own.get(metric, {}).get(("pretrained", WHOLE)) for name, own in self._by_run.items()}
        return {name: curve for name, curve in found.items() if curve}
