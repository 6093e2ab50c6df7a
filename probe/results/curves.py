"""The curves that a result holds: one metric of one variant, by layer."""

from dataclasses import dataclass

from .protocols import Result
from .words import number

METRIC = "residual"
HALF, TENTH = 0.5, 0.1  # of the residual that entered block 1


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


def collapsed(residual: float, floor: float, entered: float) -> bool:
    """The rule of verdict and callbacks: a residual at its rounding floor, or below a tenth of what entered block 1."""
    return abs(residual) <= floor or residual < TENTH * entered


def curves(result: Result, metric: str = METRIC) -> dict[tuple[str, str], Curve]:
    """The curves of `metric` by (weights, variant), in the order of the table `residuals`."""
    table = result.tables.get("residuals")
    if table is None or table.empty:
        return {}
    rows = table[(table["metric"] == metric) & table["mean"].notna()]
    found: dict[tuple[str, str], Curve] = {}
    for (weights, variant), group in rows.groupby(["weights", "variant"], sort=False):
        ordered = group.sort_values("layer")
        columns = (ordered[name].astype(float).tolist() for name in ("mean", "std", "floor"))
        found[str(weights), str(variant)] = Curve(ordered["layer"].astype(int).tolist(), *columns)
    return found
