"""What would change it: other masks and norms by layer, and a map of two interventions at the last layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rc_probe.hooks.errors import RcProbeError
from rc_probe.interventions.grammar import parse_intervention
from rc_probe.measures.importance.importance import CHANGE
from rc_probe.measures.measurement import Found, Measurement
from rc_probe.options import Options, option
from rc_probe.results.protocols import Result
from rc_probe.results.tables import BASELINE, LAYER, METRIC, Column, Table

from .axes import Axis, parse_axis

if TYPE_CHECKING:
    from rc_probe.data.samples import Samples
    from rc_probe.measures.context import Context
    from rc_probe.models.load import Loaded

    from .cells import Planned

NETWORK = Column(
    "network",
    "str",
    "`SAN`, `SAN+skip` or `transformer`, whole, without norms (`− norm`) or without skips (`− skip`)",
)
SPEC = Column("spec", "str", "the same as one intervention, for `--ablate`")
NUMBER = (
    Column("value", "float64", "mean over samples; of a loss over predictions"),
    Column("std", "float64", "standard deviation over samples (ddof 1); empty for one sample, and for what the model predicts"),
    Column("floor", "float64", "rounding floor: up to here the number is noise; empty for what the model predicts"),
    *BASELINE, *CHANGE,
)  # fmt: skip
MASKS = Table("masks", "Other masks, in several networks on the same weights", (
    Column("mask", "str", "as in `mask@all=…`; `own` is the model's"), NETWORK, SPEC, LAYER, METRIC, *NUMBER,
))  # fmt: skip
NORMS = Table("norms", "Other norms, in several networks on the same weights", (
    Column("norm", "str", "as in `norm@all=…`; `own` are the model's"), NETWORK, SPEC, LAYER, METRIC, *NUMBER,
))  # fmt: skip
PHASE = Table("phase", "A map of two interventions, at the last layer", (
    Column("x", "str", "the first one, without its value"),
    Column("x_value", "str", "its value"),
    Column("x_own", "bool", "whether that is what the model has"),
    Column("y", "str", "the second one, without its value"),
    Column("y_value", "str", "its value"),
    Column("y_own", "bool", "whether that is what the model has"),
    SPEC, METRIC,
    Column("value", "float64", "with both; mean over samples, of a loss over predictions"),
    *BASELINE, *CHANGE,
))  # fmt: skip
PANEL = "What would change it"
AXES = ("temperature", "skip")
MAP_HELP = (
    "Two interventions, each with many values, and every pair of these: 'temperature@all=0.5,1,2' 'skip@all=0,0.5,1'; a value left "
    "out means the usual ones. (default with --what-if: temperature skip)"
)


@dataclass(frozen=True)
class WhatIfOptions(Options):
    """Which changes are tried."""

    masks: bool = option(False, "Other attention masks, in the whole model and in parts of it.", panel=PANEL)
    norms: bool = option(False, "Other norms: left out, frozen, without gain and bias …", panel=PANEL)
    what_if: bool = option(False, "--masks, --norms and --map.", panel=PANEL)
    map: tuple[str, ...] = option(
        (), MAP_HELP, panel=PANEL, typed=tuple[str, str] | None, read=lambda given: tuple(given or ()),
        words=lambda given, chosen: ["--map", *given],
    )  # fmt: skip
    what_if_samples: int = option(8, "Samples that these are measured on.", panel=PANEL, least=1)

    def check(self) -> None:
        super().check()
        self.axes()

    def axes(self) -> tuple[Axis, ...]:
        """The two of the map; none where no map is asked for. RcProbeError for what is misspelt."""
        given = self.map or (AXES if self.what_if else ())
        if given and len(given) != 2:
            todo = "Give two, such as temperature skip"
            raise RcProbeError(f"{len(given)} interventions are no map", where="--map", todo=todo)
        axes = tuple(parse_axis(text) for text in given)
        if len({axis.name for axis in axes}) < len(axes):
            raise RcProbeError(
                f"{axes[0].name} is there twice", where="--map", todo="Give two different ones"
            )
        return axes

    def tries(self, spec: str) -> bool:
        """Whether `masks` or `norms` may have a cell with this spec: `mask@all=causal`, not `mlp@3`."""
        if not (self.masks or self.norms or self.what_if):
            return False
        try:
            given = parse_intervention(spec).interventions
        except RcProbeError:
            return False
        return bool({each.part for each in given} & {"mask", "norm"})


class WhatIf(Measurement):
    """One pass for each cell of the tables; cells that several tables have are run once."""

    name, subject = "what_if", "What would change it was"
    options = WhatIfOptions
    tables = (MASKS, NORMS, PHASE)
    shared = True

    def wanted(self, settings: Any) -> bool:
        return bool(settings.masks or settings.norms or settings.what_if or settings.map)

    def plan(self, loaded: Loaded, samples: Samples, settings: Any) -> Planned:
        from rc_probe.measures.importance.scored import plan_scored
        from rc_probe.tasks import first

        from .cells import Planned

        return Planned(plan_scored(loaded, first(samples, settings.what_if_samples), settings))

    def passes(self, context: Context) -> int:
        plan = context.plans[self.name]
        made = plan.scored.batches(context.loaded, context.settings)
        specs = {cell.spec for cell in plan.cells(context) if cell.interventions}
        return len(specs) * len(context.world.share(range(len(made))))

    def run(self, context: Context) -> Found:
        from .cells import what_if

        return what_if(context, context.plans[self.name])

    def entries(self, settings: Any, samples: int) -> dict[str, Any]:
        if not self.wanted(settings):
            return {}
        return {
            "masks": settings.masks or settings.what_if, "norms": settings.norms or settings.what_if,
            "map": [axis.text for axis in settings.axes()], "what_if_samples": min(settings.what_if_samples, samples),
        }  # fmt: skip

    def findings(self, result: Result) -> dict[str, Any] | None:
        from rc_probe.results.findings.what_if_words import judge_what_if

        return judge_what_if(result)
