"""An experiment as the sections of its page read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from rc_probe.reports import table_cells
from rc_probe.results.protocols import Claiming
from rc_probe.results.tables import Table


@dataclass(frozen=True)
class ExperimentView:
    """One experiment. Its tables have all the columns that are declared for them."""

    result: Claiming

    def table(self, name: str) -> pd.DataFrame:
        """A table with all its columns; no rows where the experiment has none of that name."""
        declared = self.result.declared.get(name)
        return pd.DataFrame() if declared is None else declared.read(self.result.tables)

    def first(self, name: str) -> pd.DataFrame:
        """A table with the rows of the first seed alone."""
        frame = self.table(name)
        return frame[frame["seed"] == 0] if len(frame) else frame

    def whole(self, name: str) -> table_cells.Table | None:
        """A table for reading; None without rows."""
        declared = self.result.declared.get(name)
        return None if declared is None else table_cells.whole_table(declared, self.result.tables.get(name))

    @property
    def seeds(self) -> int:
        return int(self.result.settings["seeds"])


def spread(values: pd.Series) -> table_cells.Cell:
    """The mean over seeds, with the lowest and the highest; one number where all are equal."""
    mean, low, high = float(values.mean()), float(values.min()), float(values.max())
    return table_cells.with_interval(mean, low, high) if low < high else table_cells.cell(mean)


@dataclass(frozen=True)
class OverSeeds:
    """A table of an experiment as that of one run: means over the seeds, with the lowest and the highest."""

    tables: dict[str, pd.DataFrame]
    declared: Mapping[str, Table]

    @classmethod
    def of(cls, view: ExperimentView, name: str) -> OverSeeds:
        keys = [
            c.name for c in view.result.declared[name].columns if c.dtype != "float64" and c.name != "seed"
        ]
        groups = view.table(name).groupby(keys, dropna=False, sort=False)["mean"]
        frame = groups.agg(["mean", "std", "min", "max"]).reset_index()
        frame = frame.rename(columns={"min": "low", "max": "high"})
        return cls({name: frame}, view.result.declared)
