"""Checks of a difference that fail a build: `difference_bulk@max>0.05`, `sensitivity@max:mlp>0.02`, `agreement<0.95`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Self

from rc_probe.hooks.errors import RcProbeError
from rc_probe.registry import CHANGE, DIFFERENCE_METRICS, METRICS
from rc_probe.results.checks import Outcome, Point, UnknownError, each_once, judged
from rc_probe.results.conditions import Condition, Grammar, parse_condition

from .options import DiffOptions

if TYPE_CHECKING:
    from .result import DiffResult

STREAM, PARTS, PREDICTIONS = "stream", ("block", "attention", "cross", "mixer", "mlp"), "predictions"
OF_PREDICTIONS = frozenset(
    name
    for name in DIFFERENCE_METRICS
    if name in ("agreement", "kl", "embedding_distance")
    or (name.startswith(CHANGE) and name.removeprefix(CHANGE) not in METRICS)
)
GRAMMAR = Grammar(
    DIFFERENCE_METRICS, "",
    "METRIC[@WHERE][:COMPONENT] OP NUMBER in quotes, for example 'difference@max>0.05', 'sensitivity@max:mlp>0.02' or 'agreement<0.95'",
    OF_PREDICTIONS,
)  # fmt: skip


@dataclass(frozen=True)
class DiffChecks:
    """What was asked to be checked. Empty: nothing. Each condition's variant is a component."""

    conditions: tuple[Condition, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.conditions)

    @classmethod
    def of(cls, fail_if: Sequence[str] = ()) -> Self:
        """From texts. RcProbeError for what is misspelt."""
        return cls(tuple(_of_component(parse_condition(text, GRAMMAR)) for text in each_once(fail_if)))

    def plan(self, chosen: DiffOptions) -> None:
        """RcProbeError for a check on what these options do not measure. Called before anything is loaded."""
        for asked in self.conditions:
            name, where = asked.metric.removeprefix(CHANGE), f"--fail-if {asked.text}"
            if name in METRICS and asked.metric.startswith(CHANGE) and name not in chosen.measured:
                todo = f"Add it to --metrics; measured are {', '.join(chosen.measured)}"
                raise RcProbeError(f"{name} is not measured", where=where, todo=todo)
            if asked.variant in PARTS and not chosen.sensitivity:
                raise RcProbeError(
                    "no sensitivity is measured", where=where, todo="Leave --no-sensitivity out"
                )

    def fit(self, blocks: int) -> None:
        """RcProbeError for a layer or block that the model does not have. Called before anything is measured."""
        for asked in self.conditions:
            least, what = (0, "layer") if asked.variant == STREAM else (1, "block")
            if isinstance(asked.where, int) and not least <= asked.where <= blocks:
                todo = f"Give {least} to {blocks}, or last"
                raise RcProbeError(
                    f"there is no {what} {asked.where}", where=f"--fail-if {asked.text}", todo=todo
                )

    def evaluate(self, result: DiffResult) -> list[Outcome]:
        """One outcome a check."""
        return [
            judged(each, partial(_curve, result, each), "layer" if each.variant == STREAM else "block")
            for each in self.conditions
        ]


def _of_component(asked: Condition) -> Condition:
    """With the component that its metric is of, where none is named."""
    own: tuple[str, ...] = (STREAM,)
    if asked.metric in OF_PREDICTIONS:
        own = (PREDICTIONS,)
    elif asked.metric.startswith("sensitivity"):
        own = PARTS
    if asked.variant not in ("", *own):
        what = f"no {asked.metric} of {asked.variant!r:.80} is measured"
        raise RcProbeError(what, where=f"--fail-if {asked.text}", todo=f"There is {', '.join(own)}")
    return replace(asked, variant=asked.variant or own[0])


def _curve(result: DiffResult, asked: Condition) -> dict[int, Point]:
    """The metric by layer or block, every one there and finite; of predictions the one number."""
    table = result.differences
    rows = table[table["component"].eq(asked.variant) & table["metric"].eq(asked.metric)]
    if rows.empty:
        raise UnknownError(f"{asked.metric} of {asked.variant} was not measured")
    places = rows["layer" if asked.variant == STREAM else "block"]
    columns = zip(places, rows["mean"].tolist(), rows["count"].tolist(), strict=True)
    found = {
        0 if asked.where == "" else int(at): Point(float(mean), float(count), math.nan)
        for at, mean, count in columns
    }
    if missing := [at for at, point in found.items() if not math.isfinite(point.mean)]:
        raise UnknownError(
            f"{asked.metric} of {asked.variant} has no number at {', '.join(map(str, missing))}"
        )
    return found
