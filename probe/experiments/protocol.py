"""What an experiment is: sizes, tables, what one seed measures, and the claims that its numbers decide."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import pandas as pd

from rc_probe.results.tables import CLAIMS, Column, Row, Table

from .training import Trainer

SEED = Column("seed", "int64", "of the data, the weights and the training")
Frames = Mapping[str, pd.DataFrame]  # the tables of one seed, or of all


@dataclass(frozen=True)
class Claim:
    """A statement with the number that decides it.

    >>> Claim("The whole model sorts", "Dong et al. 2021, section 4.2", lambda frames: 0.98, least=0.96).expected
    '≥ 0.96'

    number: from the tables of one seed; NaN where these sizes did not measure it
    least, most: where the number of every seed has to be for the claim to hold
    """

    claim: str
    source: str
    number: Callable[[Frames], float]
    least: float = -math.inf
    most: float = math.inf

    @property
    def expected(self) -> str:
        low, high = (f"{end:g}".replace("-", "−") for end in (self.least, self.most))
        if math.isinf(self.least):
            return f"≤ {high}"
        return f"≥ {low}" if math.isinf(self.most) else f"{low} to {high}"

    def row(self, seeds: Iterable[Frames]) -> Row:
        """Its row of the table `claims`: the mean over seeds, the lowest and the highest."""
        found = [value for one in seeds if math.isfinite(value := float(self.number(one)))]
        known = bool(found)
        return {
            "claim": self.claim,
            "source": self.source,
            "expected": self.expected,
            "measured": sum(found) / len(found) if known else None,
            "low": min(found) if known else None,
            "high": max(found) if known else None,
            "seeds": len(found),
            "holds": self.least <= min(found) and max(found) <= self.most if known else None,
        }


@dataclass(frozen=True)
class Sizes:
    """How large an experiment is. seeds: how many are run where nothing else is asked for."""

    seeds: int

    def changed(self, **values: Any) -> Any:
        return replace(self, **values)


S = TypeVar("S", bound=Sizes)


@dataclass(frozen=True)
class SeedRun(Generic[S]):
    """What `measure` is given. folder: where this seed's models go, None for nowhere; data: what --data says."""

    seed: int
    sizes: S
    trainer: Trainer
    folder: Path | None = None
    data: Any = None


class Experiment(ABC, Generic[S]):
    """One experiment. Its file ends with the one object of it, `EXPERIMENT`.

    tables: what `measure` fills; each has the column `seed` first, which is put in by the runner
    sizes, quick: of the full run, and of --quick
    reads_data: whether --data is an option of it
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    tables: ClassVar[Sequence[Table]]
    claims: ClassVar[Sequence[Claim]]
    reads_data: ClassVar[bool] = False
    sizes: S
    quick: S

    @abstractmethod
    def measure(self, run: SeedRun[S]) -> dict[str, list[Row]]:
        """Train and measure one seed: rows of the tables, without the column `seed`."""

    def digest(self, sizes: S, data: Any) -> str | None:
        """What tells the data of a user from others; None where none are read. Bad data are refused here, before any training."""
        return None

    def judge(self, seeds: Sequence[Frames]) -> pd.DataFrame:
        """The table `claims`."""
        return CLAIMS["claims"].frame(claim.row(seeds) for claim in self.claims)

    def settings(self, sizes: S) -> dict[str, Any]:
        """The sizes, for the results."""
        return asdict(sizes)


def with_seed(table: Table) -> Table:
    """The table as an experiment has it."""
    return Table(table.name, table.title, (SEED, *table.columns))
