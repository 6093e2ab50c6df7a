"""Checks that fail a build: conditions on a result, and drops against a baseline.

They fail closed: a check that cannot be evaluated (a number is missing, NaN or lost in rounding, the baseline was
measured on something else) is neither passed nor failed, and counts as an error.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from rc_probe.hooks.errors import RcProbeError
from rc_probe.registry import EMBEDDING_METRICS, METRICS, PAPER

from .conditions import OF_ATTENTION, OF_REMOVALS, Condition, Drop, parse_condition, parse_drop
from .curves import headline, metrics_of
from .findings.attention_checks import of_attention, plan_attention
from .findings.embedding_checks import of_embeddings, plan_embeddings
from .findings.removal_checks import PLACES, of_removals, plan_removals
from .findings.what_if_words import tried
from .like_for_like import Pairs, aligned, unlike
from .protocols import Measured, Result, Settled
from .tables import RUN_TABLES

if TYPE_CHECKING:
    import pandas as pd

PASSED, FAILED, UNKNOWN = 0, 1, 2  # exit codes
FAULT = "a fault of rc-probe"  # how the reason begins that a run gives for a measurement
DEFAULT_DROP = 0.05
SHOWN_DROPS = 3
COLUMNS = {"weights", "metric", "variant", "layer", "mean", "count", "floor"}


@dataclass(frozen=True)
class Outcome:
    """What became of one check. passed: None where it could not be evaluated; `said` tells the numbers or why."""

    check: str
    metric: str
    variant: str
    layer: int | None
    value: float | None
    limit: float
    passed: bool | None
    said: str

    @property
    def line(self) -> str:
        verdict = {True: "pass", False: "FAIL", None: "ERROR"}[self.passed]
        return f"{verdict}: {self.check}: {self.said}"


class Point(NamedTuple):
    """A metric at one layer, the mean over `samples`."""

    mean: float
    samples: float
    floor: float


class UnknownError(Exception):
    """Why a check cannot be evaluated."""


@dataclass(frozen=True)
class Checks:
    """What was asked to be checked. Empty: nothing."""

    conditions: tuple[Condition, ...] = ()
    drops: tuple[Drop, ...] = ()
    baseline: Result | None = None
    baseline_name: str = ""

    def __bool__(self) -> bool:
        return bool(self.conditions or self.drops)

    @property
    def words(self) -> list[str]:
        """The options of the command that ask for these checks."""
        pairs = [("--fail-if", each.text) for each in self.conditions]
        pairs += [("--baseline", self.baseline_name)] if self.baseline is not None else []
        pairs += [("--max-drop", each.text) for each in self.drops]
        return [word for pair in pairs for word in pair]

    @classmethod
    def of(
        cls,
        fail_if: Sequence[str] = (),
        baseline: Result | None = None,
        max_drop: Sequence[str | float] | str | float | None = None,
        name: str = "the baseline",
    ) -> Self:
        """From texts; `name` is the baseline's.

        Raises RcProbeError for what is misspelt.
        """
        conditions = tuple(parse_condition(text) for text in each_once(fail_if))
        limits = [max_drop] if isinstance(max_drop, str | int | float) else list(max_drop or ())
        if limits and baseline is None:
            todo = "Give --baseline, the results.json of an earlier run"
            raise RcProbeError("it needs --baseline", where="--max-drop", todo=todo)
        if baseline is None:
            return cls(conditions)
        default = headline(metrics_of(baseline))
        drops = tuple(parse_drop(text, default) for text in each_once(limits or [DEFAULT_DROP]))
        return cls(conditions, drops, baseline, name)

    def plan(self, chosen: Measured) -> None:
        """RcProbeError for a check on what these settings do not measure. Called before anything is loaded."""
        every: list[Condition | Drop] = [*self.conditions, *self.drops]
        for asked in every:
            if asked.metric in OF_REMOVALS:
                plan_removals(asked.text, asked.metric, asked.variant, chosen)
                continue
            if asked.metric in OF_ATTENTION:
                plan_attention(asked.text, asked.metric, asked.variant, chosen)
                continue
            if asked.metric in EMBEDDING_METRICS:
                plan_embeddings(asked.text, asked.variant, chosen)
                continue
            if asked.metric not in chosen.measured:
                todo = (
                    f"Add it to --metrics (or raise --svd-samples); measured are {', '.join(chosen.measured)}"
                )
                raise RcProbeError(f"{asked.metric} is not measured", where=asked.text, todo=todo)
            variants = [*PAPER, *chosen.ablate]
            if asked.variant not in variants and not chosen.tries(asked.variant):
                todo = f"There are {', '.join(variants)}; ablations are measured with --ablate"
                raise RcProbeError(f"no variant {asked.variant!r} is measured", where=asked.text, todo=todo)

    def fit(self, blocks: int) -> None:
        """RcProbeError for a layer or block that a model of so many blocks does not have. Called before anything is measured."""
        for asked in self.conditions:
            place = _place(asked)
            least = int(place != "layer")  # blocks and removals count from 1
            most, todo = blocks, f"Give {least} to {blocks}, or last"
            if place == "removal":
                most, todo = sys.maxsize, "Give 1 or more, or last"
            if isinstance(asked.where, int) and not least <= asked.where <= most:
                what = f"there is no {place} {asked.where}"
                raise RcProbeError(what, where=f"--fail-if {asked.text}", todo=todo)

    def evaluate(self, result: Result) -> list[Outcome]:
        """One outcome a check, on the pretrained weights' rows of the table `residuals`."""
        return [judged(each, partial(_asked, result, each), _place(each)) for each in self.conditions] + [
            _drop(result, self.baseline, self.baseline_name, each)
            for each in self.drops
            if self.baseline is not None
        ]


def flat(conditions: Sequence[Any]) -> list[Any]:
    """The conditions one by one, of which some may come in lists."""
    return [text for one in conditions for text in (one if isinstance(one, list | tuple) else [one])]


def each_once(items: Sequence[Any]) -> list[Any]:
    return [item for place, item in enumerate(items) if item not in items[:place]]


def table_of(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """The table `checks`, one row per check."""
    return RUN_TABLES["checks"].frame(map(asdict, outcomes))


def exit_code(outcomes: Sequence[Outcome], result: Settled) -> int:
    """0 all passed, 1 a check failed, 2 a check could not be evaluated, or none was asked for and a measurement had a fault."""
    if any(outcome.passed is None for outcome in outcomes) or (not outcomes and faults(result)):
        return UNKNOWN
    return PASSED if all(outcome.passed for outcome in outcomes) else FAILED


def faults(result: Settled) -> dict[str, str]:
    """The measurements that ended in an error that nobody foresaw, and it."""
    missing: dict[str, str] = result.settings.get("missing") or {}
    return {name: why for name, why in missing.items() if why.startswith(FAULT)}


def fail_if(result: Result, checks: Checks) -> list[Outcome]:
    """See `ProbeResult.fail_if`."""
    if not checks:
        raise RcProbeError("nothing to check", where="fail_if", todo="Give a condition or a baseline")
    return passed_all(checks.evaluate(result))


def passed_all(outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes; AssertionError where one failed, RcProbeError where one could not be evaluated."""
    unknown = [outcome for outcome in outcomes if outcome.passed is None]
    if unknown:
        raise RcProbeError("; ".join(outcome.said for outcome in unknown), where=unknown[0].check)
    failed = [outcome.line for outcome in outcomes if not outcome.passed]
    if failed:
        raise AssertionError("; ".join(failed))
    return outcomes


def judged(asked: Condition, curve_of: Callable[[], dict[int, Point]], place: str = "layer") -> Outcome:
    """A condition on a curve; curve_of: may raise UnknownError. place: what its points are called."""
    about = (asked.text, asked.metric, asked.variant)
    try:
        at, value = _value(curve_of(), asked, place)
    except UnknownError as why:
        return Outcome(*about, None, None, asked.limit, None, str(why))
    said = "" if asked.where == "" else f" over the {place}s" if at is None else f" at {place} {at}"
    return Outcome(*about, at, value, asked.limit, not asked.holds(value), f"{value:.6g}{said}")


def _place(asked: Condition) -> str:
    """What stands behind its @."""
    return "block" if asked.metric in OF_ATTENTION else PLACES.get(asked.metric, "layer")


def _asked(result: Result, asked: Condition) -> dict[int, Point]:
    if asked.metric in OF_REMOVALS:
        return _unfloored(asked, of_removals(result, asked.metric, asked.variant))
    if asked.metric in OF_ATTENTION:
        return _unfloored(asked, of_attention(result, asked.metric, asked.variant))
    if asked.metric in EMBEDDING_METRICS:
        return _embedded(result, asked)
    return _curve(result, asked.metric, asked.variant)


def _unfloored(asked: Condition, values: dict[int, float]) -> dict[int, Point]:
    """What a removal costs, by block or by how many parts are gone; what heads do, by block. No rounding floor is known."""
    if not values:
        raise UnknownError(f"{asked.metric} of {asked.variant} was not measured")
    return {place: Point(value, 0, -1) for place, value in values.items()}


def _embedded(result: Result, asked: Condition) -> dict[int, Point]:
    found = {layer: Point(value, 0, -1) for layer, value in of_embeddings(result, asked.metric).items()}
    if not found:
        raise UnknownError(
            f"{asked.metric} was not measured: {result.settings.get('missing', {}).get('embeddings') or 'the model’s own task is another (--embeddings asks for it)'}"
        )
    return found


def _curve(result: Result, metric: str, variant: str) -> dict[int, Point]:
    """The metric by layer, every layer of the model there and finite."""
    table = result.tables.get("residuals")
    if table is None or table.empty:
        raise UnknownError("no residuals were measured")
    if lacking := COLUMNS - set(table):
        raise UnknownError(f"the table residuals has no column {', '.join(sorted(lacking))}")
    mine = table["weights"].eq("pretrained") & table["metric"].eq(metric) & table["variant"].eq(variant)
    rows = table[mine] if mine.any() else tried(result, metric, variant)
    columns = (rows[name].tolist() for name in ("layer", "mean", "count", "floor"))
    curve = {int(layer): Point(*map(float, rest)) for layer, *rest in zip(*columns, strict=True)}
    if not curve:
        raise UnknownError(f"{metric} of {variant} was not measured")
    layers = range(int(result.model.get("blocks") or max(curve)) + 1)
    missing = [layer for layer in layers if layer not in curve or not math.isfinite(curve[layer].mean)]
    if missing:
        raise UnknownError(f"{metric} of {variant} has no number at {_layers(missing)}")
    return curve


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _value(curve: dict[int, Point], asked: Condition, place: str) -> tuple[int | None, float]:
    """(layer, value) that the condition is about; no layer where it is a mean."""
    if asked.where in ("mean", ""):
        return None, math.fsum(point.mean for point in curve.values()) / len(curve)
    low, high = min(curve, key=lambda n: curve[n].mean), max(curve, key=lambda n: curve[n].mean)
    named = {"first": min(curve), "last": max(curve), "min": low, "max": high}
    layer = asked.where if isinstance(asked.where, int) else named[asked.where]
    if layer not in curve:
        raise UnknownError(f"there is no {place} {layer}, only {min(curve)} to {max(curve)}")
    value, _, floor = curve[layer]
    if abs(value) <= floor and abs(asked.limit) <= floor:
        raise UnknownError(
            f"{value:.3g} at layer {layer} and the limit are both within the rounding floor {floor:.3g}"
        )
    return layer, value


def _drop(result: Result, baseline: Result, name: str, asked: Drop) -> Outcome:
    about = (asked.text, asked.metric, asked.variant)
    try:
        pairs = _alike(result, baseline, name)
        now, theirs = (_curve(each, asked.metric, asked.variant) for each in (result, baseline))
        now, before = {one: now[one] for one, _ in pairs}, {one: theirs[other] for one, other in pairs}
        if any(now[layer].samples != before[layer].samples for layer in now):
            raise UnknownError(f"{name} measured {asked.metric} on other numbers of samples")
    except UnknownError as why:
        return Outcome(*about, None, None, asked.most, None, str(why))
    sign = 1.0 if METRICS[asked.metric].better == "higher" else -1.0
    drops = {layer: sign * (before[layer].mean - now[layer].mean) for layer in now}
    worst = sorted(drops, key=lambda layer: -drops[layer])
    too_far = [layer for layer in worst if drops[layer] > asked.most]
    shown = [
        f"{drops[n]:.6g} at layer {n} ({before[n].mean:.6g} → {now[n].mean:.6g})"
        for n in (too_far or worst[:1])[:SHOWN_DROPS]
    ]
    more = f" and {len(too_far) - SHOWN_DROPS} more layers" if len(too_far) > SHOWN_DROPS else ""
    said = f"{'' if too_far else 'at most '}{', '.join(shown)}{more}, against {name}"
    return Outcome(*about, worst[0], drops[worst[0]], asked.most, not too_far, said)


def _alike(result: Result, baseline: Result, name: str) -> Pairs:
    """The layers that correspond, of two results that were measured on the same samples in the same way."""
    mine, theirs = result.model.get("blocks"), baseline.model.get("blocks")
    pairs = aligned(result, baseline)
    if pairs is None:
        raise UnknownError(
            f"cannot be compared: {name} has {theirs} layers and this model {mine}, and their weights do not say which of "
            "them correspond"
        )
    for what, (was, now) in unlike([baseline.settings, result.settings], tokens=True).items():
        raise UnknownError(f"cannot be compared: {what} was {was} in {name} and is {now}")
    return pairs
