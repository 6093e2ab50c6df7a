"""The curves that a result holds: one metric of one variant, by layer."""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from .protocols import Result
from .words import number

RESIDUAL, BULK = "residual", "residual_bulk"
HALF, TENTH = 0.5, 0.1  # of the residual that entered block 1


KEYS = ("metric", "weights", "variant")  # what says which curve a row is of


@dataclass(frozen=True)
class Curve:
    """One metric by layer for one weights and variant; layers without a value are left out."""

    layers: list[int]
    means: list[float]
    stds: list[float]  # NaN where there is one sample
    floors: list[float]  # NaN where none is known

    def at_floor(self, index: int) -> bool:
        """True where the value cannot be told from rounding noise."""
        return abs(self.means[index]) <= self.floors[index]

    def collapsed_at(self, index: int) -> bool:
        """True at the rounding floor, and below a tenth of what entered block 1."""
        return collapsed(self.means[index], self.floors[index], self.means[0])

    @property
    def ending(self) -> str:
        """How it ends: `ends at 0.41`, or `falls to the rounding floor (2.0×10⁻⁷) by layer 3`."""
        if not self.at_floor(-1):
            return f"ends at {number(self.means[-1])}"
        first = next(i for i in range(len(self.layers)) if self.at_floor(i))
        return f"falls to the rounding floor ({number(self.floors[-1])}) by layer {self.layers[first]}"


Curves = dict[tuple[str, str], Curve]  # by weights and variant


def collapsed(residual: float, floor: float, entered: float) -> bool:
    """The rule of verdict and callbacks: a residual at its rounding floor, or below a tenth of what entered block 1."""
    return abs(residual) <= floor or residual < TENTH * entered


def headline(metrics: Container[str]) -> str:
    """The metric that speaks for a model: the residual of the bulk, or the paper's where it alone was measured."""
    return BULK if BULK in metrics or RESIDUAL not in metrics else RESIDUAL


def metrics_of(result: Result) -> set[str]:
    """Names of the metrics of the table `residuals`."""
    table = result.tables.get("residuals")
    return set() if table is None or "metric" not in table else set(map(str, table["metric"].unique()))


def curves(result: Result, metric: str | None = None) -> Curves:
    """The curves of a metric, None: of the headline, in the order of the table `residuals`."""
    found = curves_by_metric(result)
    return found.get(metric or headline(found), {})


def curves_by_metric(result: Result) -> dict[str, Curves]:
    """The curves of every metric of the table `residuals`; those without a value are left out."""
    table = result.tables.get("residuals")
    if table is None or table.empty:
        return {}
    rows = table[table["mean"].notna()].sort_values("layer", kind="stable")
    points: dict[tuple[str, ...], list[Any]] = {}
    for name in table[list(KEYS)].drop_duplicates().itertuples(index=False, name=None):
        points[name] = []  # in the table's order, not by layer
    columns = [rows[name].astype(float).tolist() for name in ("layer", "mean", "std", "floor")]
    for name, *point in zip(rows[list(KEYS)].itertuples(index=False, name=None), *columns, strict=True):
        points[name].append(point)
    found: dict[str, Curves] = {}
    for (metric, weights, variant), several in points.items():
        if several:
            layers, *values = map(list, zip(*several, strict=True))
            found.setdefault(str(metric), {})[str(weights), str(variant)] = Curve(
                [*map(int, layers)], *values
            )
    return found
