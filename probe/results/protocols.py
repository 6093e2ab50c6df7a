"""What reports and checks read of a result, and of several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from .tables import Table


class Measured(Protocol):
    """Which metrics are measured, and which ablations; see `rc_probe.settings`."""

    @property
    def measured(self) -> Sequence[str]:
        """Names of metrics."""

    @property
    def ablate(self) -> Sequence[str]:
        """What is left out, one spec each."""

    def tries(self, spec: str) -> bool:
        """Whether other masks or norms are measured, this one perhaps among them."""


class Tables(Protocol):
    """Whatever has tables."""

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Tidy frames by name."""

    def to_json(self) -> str:
        """All of it as JSON."""


class Declaring(Protocol):
    """Tables whose columns are declared."""

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Tidy frames by name."""

    @property
    def declared(self) -> Mapping[str, Table]:
        """What a table's columns mean, by its name."""


class Result(Tables, Protocol):
    """One run; see `rc_probe.ProbeResult`."""

    model: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    source: Path | None  # the file that it was loaded from

    @property
    def declared(self) -> Mapping[str, Table]:
        """What a table's columns mean, by its name."""

    @property
    def verdict(self) -> dict[str, Any]:
        """The finding in words and numbers."""


class Described(Protocol):
    """Whatever says which model it is about."""

    @property
    def model(self) -> dict[str, Any]:
        """What is known of it."""


class Settled(Protocol):
    """Whatever says how it was measured."""

    settings: dict[str, Any]


class Differing(Tables, Protocol):
    """The difference of two models; see `rc_probe.difference.result.DiffResult`."""

    a: dict[str, Any]
    b: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]

    @property
    def declared(self) -> Mapping[str, Table]:
        """What a table's columns mean, by its name."""

    @property
    def verdict(self) -> dict[str, Any]:
        """The finding in words and numbers."""


class Claiming(Tables, Protocol):
    """An experiment with its claims; see `rc_probe.experiments.result.ExperimentResult`."""

    experiment: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]

    @property
    def declared(self) -> Mapping[str, Table]:
        """What a table's columns mean, by its name."""

    @property
    def verdict(self) -> dict[str, Any]:
        """The finding in words and numbers."""


@dataclass(frozen=True)
class Run:
    """One result in a comparison. step: of the training, where it is a checkpoint."""

    name: str
    result: Result
    step: int | None = None


@dataclass(frozen=True)
class Failure:
    """A run that could not be made, and why."""

    name: str
    error: str


class Compared(Tables, Protocol):
    """Several runs; see `rc_probe.comparison.Comparison`."""

    runs: list[Run]
    failures: list[Failure]
    title: str
    command: str | None

    @property
    def metric(self) -> str:
        """The metric that all runs are compared by."""

    @property
    def training(self) -> bool:
        """Whether the runs are checkpoints of one model."""

    @property
    def differences(self) -> dict[str, dict[str, str]]:
        """What was not measured alike, by setting and run."""

    def common_ablations(self) -> pd.DataFrame:
        """The residual at the last layer under each ablation that all runs have."""
