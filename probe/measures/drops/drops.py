"""What can go: parts removed one after the other, each the one whose loss costs least, scored on samples that did not choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rc_probe.hooks.errors import RcProbeError
from rc_probe.measures.importance.importance import CHANGE
from rc_probe.measures.measurement import Found, Measurement
from rc_probe.options import Options, names_of, option
from rc_probe.results.findings.limits import Limit, parse_limit
from rc_probe.results.protocols import Result
from rc_probe.results.tables import BASELINE, METRIC, Column, Table

if TYPE_CHECKING:
    from rc_probe.data.samples import Samples
    from rc_probe.measures.context import Context
    from rc_probe.models.load import Loaded

    from .search import Halves

DROPS = Table("drops", "What is left after so many removals", (
    Column("method", "str", "`greedy` (by what is left of the model's own task), `angular` (a window of blocks), `random`"),
    Column("draw", "int64", "which random order, from 1; empty for other methods"),
    Column("split", "str", "`chosen`: the half of the samples that chose; `held_out`: the other half"),
    Column("step", "int64", "how many parts are removed"),
    Column("component", "str", "what this step removes: `block`, `attention` or `mlp`"),
    Column("block", "int64", "of which block, from 1; of `angular` the first block of a window that is `step` long"),
    METRIC,
    Column("value", "float64", "without all parts up to this step"),
    *BASELINE, *CHANGE,
))  # fmt: skip
PARTS = ("block", "attention", "mlp")
PANEL = "What can go"
DROP_HELP = "Remove so many parts one after the other, each the one that the model's own loss misses least."
UNTIL_HELP = "Remove parts as long as this does not hold: 'loss>+0.1' (0.1 above the whole model), 'accuracy<0.8', 'kl>0.05'."
PARTS_HELP = "What may go, separated by commas: block, attention, mlp. (default: block)"


def _read_parts(text: str | None) -> tuple[str, ...]:
    return names_of(text) or ("block",)


@dataclass(frozen=True)
class DropOptions(Options):
    """How many parts go, of which kinds. Nothing is searched without `drop` or `drop_until`."""

    drop: int | None = option(None, DROP_HELP, panel=PANEL, least=1)
    drop_until: str | None = option(None, UNTIL_HELP, panel=PANEL)
    drop_parts: tuple[str, ...] = option(
        ("block",), PARTS_HELP, panel=PANEL, typed=str | None, read=_read_parts,
        words=lambda parts, chosen: ["--drop-parts", ",".join(parts)],
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        for part in self.drop_parts:
            if part not in PARTS:
                todo = f"Choose among {', '.join(PARTS)}"
                raise RcProbeError(f"no parts are called {part!r}", where="--drop-parts", todo=todo)
        if "block" in self.drop_parts and len(self.drop_parts) > 1:
            todo = "Drop blocks, or branches (attention,mlp)"
            raise RcProbeError("a block holds its branches", where="--drop-parts", todo=todo)
        self.limit()

    def limit(self) -> Limit | None:
        """What ends the search, beside the number. RcProbeError where it is misspelt."""
        return None if self.drop_until is None else parse_limit(self.drop_until)


class Drops(Measurement):
    """Greedy, window and random removals on one half of the samples; all of them scored on the other half."""

    name, subject = "drops", "What can go was"
    options = DropOptions
    tables = (DROPS,)
    shared = True

    def wanted(self, settings: Any) -> bool:
        return settings.drop is not None or settings.drop_until is not None

    def plan(self, loaded: Loaded, samples: Samples, settings: Any) -> Halves:
        from .search import plan_halves

        return plan_halves(loaded, samples, settings)

    def passes(self, context: Context) -> int:
        from .search import most_steps

        most_steps(context.structure, context.settings)  # a number that is too large ends the run here
        return 0

    def run(self, context: Context) -> Found:
        from .search import drops

        return drops(context, context.plans[self.name])

    def entries(self, settings: Any, samples: int) -> dict[str, Any]:
        if not self.wanted(settings):
            return {}
        return {
            "drop": settings.drop,
            "drop_until": settings.drop_until,
            "drop_parts": list(settings.drop_parts),
        }

    def findings(self, result: Result) -> dict[str, Any] | None:
        from rc_probe.results.findings.drop_words import judge_drops

        return judge_drops(result)
