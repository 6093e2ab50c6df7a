"""Importance: what the model loses without each part alone, by its own task; and what proxies say of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rc_probe.hooks.errors import RcProbeError
from rc_probe.measures.measurement import Found, Measurement
from rc_probe.options import Options, option
from rc_probe.results.protocols import Result
from rc_probe.results.tables import BASELINE, METRIC, Column, Table

if TYPE_CHECKING:
    from rc_probe.budget import Shape
    from rc_probe.data.samples import Samples
    from rc_probe.measures.context import Context
    from rc_probe.models.load import Loaded

    from .scored import Plan

CHANGE = (
    Column("low", "float64", "lower end of the 95 % interval of the change, paired over samples; empty for fewer than 8"),
    Column("high", "float64", "upper end of it"),
    Column("count", "int64", "how many samples"),
)  # fmt: skip
IMPORTANCE = Table("importance", "What the model loses without each part alone", (
    Column("component", "str", "what is removed: `block`, a branch or its skip (`attention`, `attention.skip`, `mlp`, …), `head`"),
    Column("block", "int64", "of which block, from 1"),
    Column("head", "int64", "which head, from 1; empty for all else"),
    METRIC,
    Column("value", "float64", "without the part; of a `proxy_…`, which removes nothing, the proxy itself"),
    *BASELINE, *CHANGE,
))  # fmt: skip
CHOICES = ("blocks", "parts", "heads", "none")
ENOUGH = 16  # samples from which on blocks are measured by default
FEW = 8  # samples that an interval needs: fewer only where shorter texts do not help
PASSES = 16  # plain passes over all samples that removing every block may cost
HELP = (
    "What the model loses without each part alone: 'blocks', 'parts' (blocks, and each branch and skip), 'heads' "
    "(blocks and heads) or 'none'. (default: blocks, where there are 16 samples)"
)


@dataclass(frozen=True)
class ImportanceOptions(Options):
    """Which parts are removed. None: the blocks, where there are ENOUGH samples."""

    importance: str | None = option(None, HELP)
    importance_samples: int | None = option(
        None, "Samples that importance is measured on. (default: 16, fewer of deep models)", least=1
    )

    def check(self) -> None:
        super().check()
        if self.importance not in (None, *CHOICES):
            todo = f"Choose one of {', '.join(CHOICES)}"
            raise RcProbeError(f"no parts are called {self.importance!r}", where="--importance", todo=todo)

    def parts_of(self, samples: int | None) -> str:
        """One of CHOICES, for a run on so many samples; None: as many as there are by default."""
        return self.importance or ("blocks" if samples is None or samples >= ENOUGH else "none")


def affordable(shape: Shape, most: int, *, texts: bool) -> tuple[int, int]:
    """Samples and tokens of each, of which `most` and all are what is wanted: as rc_probe.budget allows, or least.

    Passes begin at the block that is removed, so that all together cost half as many plain passes as there are blocks; one
    is the plain pass, one the proof. The head runs in each.
    """
    from rc_probe.budget import HALF, first_that_fits

    counts = dict.fromkeys((most, min(FEW, most)))
    choices = [(n, t) for t in (shape.halved() if texts else [shape.tokens]) for n in counts]

    def work(choice: tuple[int, int]) -> float:
        n, t = choice
        one = shape.plain(t) * (shape.blocks / 2 + 2) + (shape.blocks + 1) * float(shape.head) * t
        return n * one * (HALF if shape.half else 1)

    return first_that_fits(choices, shape, work, passes=PASSES) or choices[-1]


class Importance(Measurement):
    """One pass for each part, which begins at the part."""

    name, subject = "importance", "Importance was"
    options = ImportanceOptions
    tables = (IMPORTANCE,)
    shared = True

    def wanted(self, settings: Any) -> bool:
        return bool(settings.parts_of(settings.samples) != "none")

    def plan(self, loaded: Loaded, samples: Samples, settings: Any) -> Plan | None:
        from rc_probe.tasks import first

        from .scored import plan_scored

        if settings.parts_of(len(samples.items)) == "none":
            return None
        return plan_scored(loaded, first(samples, settings.importance_samples or ENOUGH), settings)

    def passes(self, context: Context) -> int:
        plan = self._affordable(context)
        if plan is None:
            return 0
        from .removed import removals

        batches = context.world.share(range(len(plan.batches(context.loaded, context.settings))))
        parts = self._parts(context)
        return len(batches) * (len(removals(context.structure, parts)) + (parts == "parts"))

    def run(self, context: Context) -> Found:
        plan = self._affordable(context)
        if plan is None:
            return Found()
        from .removed import importance

        return importance(context, plan, self._parts(context))

    def _affordable(self, context: Context) -> Plan | None:
        """What was planned, or less of it, where nobody asked for a number of samples or for more than blocks."""
        plan: Plan | None = context.plans[self.name]
        asked = context.settings.importance_samples is not None or self._parts(context) != "blocks"
        if plan is None or asked:
            return plan
        from .scored import cut

        choice = affordable(context.shape, len(plan.samples.items), texts=context.loaded.modality == "text")
        return cut(context, plan, *choice, PASSES)

    def _parts(self, context: Context) -> str:
        return str(context.settings.parts_of(len(context.samples.items)))

    def entries(self, settings: Any, samples: int) -> dict[str, Any]:
        parts = settings.parts_of(samples)
        asked = settings.importance_samples or ENOUGH
        few = {} if parts == "none" else {"importance_samples": min(asked, samples)}
        return {"importance": parts, **few}

    def findings(self, result: Result) -> dict[str, Any] | None:
        from rc_probe.results.findings.importance_words import judge_importance

        return judge_importance(result)
