"""Truncation: what the model loses with heads of less rank, and how far rows of attention, tokens found and collapse move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rc_probe.hooks.errors import RcProbeError
from rc_probe.measures.measurement import Found, Measurement
from rc_probe.options import Options, names_of, option
from rc_probe.results.protocols import Result
from rc_probe.results.tables import BASELINE, LAYER, METRIC, Column, Table

if TYPE_CHECKING:
    from rc_probe.data.samples import Samples
    from rc_probe.measures.context import Context
    from rc_probe.models.load import Loaded

    from .truncated import Planned

RANK = Column("rank", "int64", "of each truncated head; empty where each has its own")
METHOD = Column(
    "method",
    "str",
    "what is kept: `weights`, `data`, `bottom`, `random`; `smallest`: each head its smallest rank, by `data`",
)
TRUNCATION = Table("truncation", "What heads of less rank cost", (
    Column("block", "int64", "number of the truncated block, from 1; empty for all that can be"),
    Column("head", "int64", "number of the truncated head, from 1; empty for all of the block"),
    RANK, METHOD, METRIC,
    Column("value", "float64", "with these heads truncated"),
    *BASELINE,
))  # fmt: skip
CURVES = Table("truncation_curves", "Collapse with heads of less rank", (
    Column("network", "str", "`transformer`, or `SAN`: attention without its skips and without MLPs"),
    RANK, METHOD, LAYER, METRIC,
    Column("value", "float64", "mean over samples"),
    Column("baseline", "float64", "the same network with heads of full rank"),
))  # fmt: skip
PANEL = "Ranks of heads"
SAMPLES, TOLERANCE = 16, 0.01
HELP = "Blocks whose heads are truncated, alone and together: 'all', or numbers such as 2,5. The whole model is truncated, too."
RANKS_HELP = "Ranks to truncate to, separated by commas. (default: powers of two below the width of a head)"
TOLERANCE_HELP = "What a head may cost by itself, in nats of the loss (or of what stands for it), to be called small enough."


def _read_ranks(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in names_of(text) or ())
    except ValueError:
        todo = "Write --truncation-ranks 1,2,4,8"
        raise RcProbeError(f"{text!r} are no ranks", where="--truncation-ranks", todo=todo) from None


@dataclass(frozen=True)
class TruncationOptions(Options):
    """Which blocks, to which ranks. Nothing is truncated without `truncation`."""

    truncation: str | None = option(None, HELP, panel=PANEL)
    truncation_ranks: tuple[int, ...] = option(
        (), RANKS_HELP, panel=PANEL, typed=str | None, read=_read_ranks, least=0,
        words=lambda ranks, chosen: ["--truncation-ranks", ",".join(map(str, ranks))],
    )  # fmt: skip
    truncation_samples: int = option(SAMPLES, "Samples that truncation is scored on.", panel=PANEL, least=1)
    head_tolerance: float = option(
        TOLERANCE, TOLERANCE_HELP, panel=PANEL, words=lambda most, chosen: ["--head-tolerance", str(most)]
    )

    def check(self) -> None:
        super().check()
        self.truncated_blocks()
        if not self.head_tolerance >= 0:
            what = f"{self.head_tolerance!r} is no cost"
            raise RcProbeError(what, where="--head-tolerance", todo="Give a number from 0, such as 0.01")

    def truncated_blocks(self) -> tuple[int, ...] | None:
        """Numbers from 1; None: all."""
        from rc_probe.interventions.grammar import parse_intervention

        if self.truncation in (None, "all"):
            return None
        try:
            return parse_intervention(f"rank@{self.truncation}=1").interventions[0].blocks
        except RcProbeError as error:
            todo = "Write 'all', or numbers such as 2,5"
            raise RcProbeError(error.what, where="--truncation", todo=todo) from error


class Truncation(Measurement):
    """A pass for each rank and method: of the whole model, of each named block, of each of its heads, and of the SAN."""

    name, subject = "truncation", "Truncation of heads was"
    options = TruncationOptions
    tables = (TRUNCATION, CURVES)
    shared = True

    def wanted(self, settings: Any) -> bool:
        return bool(settings.truncation is not None)

    def plan(self, loaded: Loaded, samples: Samples, settings: Any) -> Planned:
        from rc_probe.measures.importance.scored import plan_scored
        from rc_probe.tasks import first

        from .truncated import Planned

        return Planned(plan_scored(loaded, first(samples, settings.truncation_samples), settings))

    def passes(self, context: Context) -> int:
        plan = context.plans.get(self.name)
        if plan is None:
            return 0
        batches = context.world.share(range(len(plan.scored.batches(context.loaded, context.settings))))
        return len(batches) * len(plan.cells(context).given)

    def run(self, context: Context) -> Found:
        from .truncated import truncation

        return truncation(context, context.plans[self.name])

    def entries(self, settings: Any, samples: int) -> dict[str, Any]:
        if settings.truncation is None:
            return {"truncation": None}
        return {
            "truncation": settings.truncation, "truncation_ranks": list(settings.truncation_ranks),
            "truncation_samples": min(settings.truncation_samples, samples), "head_tolerance": settings.head_tolerance,
        }  # fmt: skip

    def findings(self, result: Result) -> dict[str, Any] | None:
        from rc_probe.results.findings.heads.truncation_words import judge_truncation

        return judge_truncation(result)
