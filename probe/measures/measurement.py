"""The protocol of a measurement: what it needs, which tables it fills, what it says. Listed in `MEASUREMENTS`.

No torch is imported here, or in a measurement's file before `run`: `rc-probe --help` reads the options.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from rc_probe.common_options import CommonOptions
from rc_probe.hooks.errors import RcProbeError
from rc_probe.options import Options, about, flag
from rc_probe.results.protocols import Result
from rc_probe.results.tables import Row, Table

if TYPE_CHECKING:
    from rc_probe.data.samples import Samples
    from rc_probe.engine import Reader
    from rc_probe.models.load import Loaded

    from .context import Context


@dataclass
class Found:
    """What a measurement found. tables: rows by the name of their table; notes: sentences for the reader.

    facts: of the results' entry `model`, under the measurement's name
    missing: why there is nothing, where the run left it out
    kept: for its next run, on the next fresh weights
    """

    tables: dict[str, list[Row]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    missing: str = ""
    kept: Any = None


OFF = "none"  # of an option with several values, as False is of others: nothing is measured, and nothing more is said


class Measurement:
    """One section's worth of numbers. What it cannot do on a model it says in a note, or raises as RcProbeError.

    name: of its section. subject: how a sentence begins that says it was not measured: `Paths were`
    options: its own, fields of `Settings`; tables: those it fills
    on_mixed: it changes nothing in the model, and so measures those, too, whose blocks mix several streams (DeepSeek-V4)
    on_fresh: it measures freshly initialised weights, too
    shared: all processes run it, each on its share of the batches; else the first runs it alone
    needed: nothing is worth saving without it, so that its error ends the run; of others it is a note
    """

    name: ClassVar[str]
    subject: ClassVar[str]
    options: ClassVar[type[Options]] = Options
    tables: ClassVar[tuple[Table, ...]] = ()
    on_mixed: ClassVar[bool] = False
    on_fresh: ClassVar[bool] = False
    shared: ClassVar[bool] = False
    needed: ClassVar[bool] = False

    @property
    def now(self) -> str:
        """The subject within a sentence: `paths are`."""
        things, _, was = self.subject.rpartition(" ")
        return f"{things[0].lower()}{things[1:]} {'is' if was == 'was' else 'are'}"

    def wanted(self, settings: Any) -> bool:
        """Whether these settings ask for it."""
        return True

    def plan(self, loaded: Loaded, samples: Samples, settings: Any) -> Any:
        """What it will be measured on, `context.plan` later. RcProbeError here ends the run before any pass."""
        return None

    def passes(self, context: Context) -> int:
        """How many passes it will report by `context.advance(…, passes=1)`."""
        return 0

    def reader(self, context: Context) -> Reader | None:
        """What reads the passes of the curves, and is `context.readers[name]` later: no pass is run twice."""
        return None

    def run(self, context: Context) -> Found:
        """Measure, or put together what the reader has seen."""
        raise NotImplementedError

    def entries(self, settings: Any, samples: int) -> dict[str, Any]:
        """Its options as they were, for the results' entry `settings`."""
        return {}

    def findings(self, result: Result) -> dict[str, Any] | None:
        """What a saved result says of it, for the verdict's entry of this name; None where there is none."""
        return None

    @property
    def has_findings(self) -> bool:
        return type(self).findings is not Measurement.findings


class _Whole(Options):
    """The options of all measurements together."""

    measurements: ClassVar[tuple[Measurement, ...]] = ()

    def check(self) -> None:
        super().check()
        for each in self.measurements:
            if not each.wanted(self):
                self._refuse_idle(each)

    def _refuse_idle(self, unwanted: Measurement) -> None:
        """RcProbeError for an option of a measurement that is not made."""
        mine = fields(unwanted.options)
        given = [each for each in mine if getattr(self, each.name) != each.default]
        off = [each for each in given if unwanted.wanted(replace(self, **{each.name: each.default}))]
        for each in given:
            value = getattr(self, each.name)
            idle = each not in off and value is not False and value != OFF  # 0 is a number, and not off
            if idle and not about(each).hidden:  # what is hidden belongs to another option
                todo = (
                    f"Leave it out, or leave {' '.join(word for one in off for word in self._words(one))} out"
                )
                what = f"it changes nothing: {unwanted.now} not measured"
                raise RcProbeError(what, where=flag(each), todo=todo if off else "Leave it out")


def settings_type(*measurements: Measurement) -> type[CommonOptions]:
    """The options of a run: the common ones, then those of each measurement."""
    groups = [each.options for each in measurements if each.options is not Options]
    made = type(
        "Settings",
        (_Whole, *reversed(groups), CommonOptions),
        {"__doc__": "How to measure; each field is an option.", "measurements": measurements},
    )
    return dataclass(frozen=True)(made)
