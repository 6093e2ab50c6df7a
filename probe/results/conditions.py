"""Conditions on a result, written as text: `residual_bulk@last<0.1`, `cosine@max:SAN+skip>0.99`.

No torch and no pandas here: a misspelt condition is refused before anything is loaded.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from rc_probe.hooks.errors import RcProbeError
from rc_probe.registry import ATTENTION_METRICS, EMBEDDING_METRICS, METRICS, WHOLE, Metric

from .curves import BULK

FORM = "METRIC@WHERE[:VARIANT] OP NUMBER in quotes, for example 'residual_bulk@last<0.1' or 'cosine@max:SAN>0.99'"
WHERE = ("first", "last", "min", "max", "mean")  # or the number of a layer
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
MOST_DIGITS = 4  # of a layer's number
# What is not of the stream: `importance@BLOCK[:COMPONENT]`, the change without a part, and `drops@STEP[:METHOD]`, that of so many removals
# on samples held out; each with what is meant where no variant is named.
OF_REMOVALS = {"importance": "block", "drops": "greedy"}
# `sink_share@BLOCK[:mean|least|most|HEAD]`, of the heads of a block.
OF_ATTENTION = dict.fromkeys(ATTENTION_METRICS, "mean")
_PATTERN = re.compile(
    r"\s*(?P<metric>[^@:<>=!]+?)\s*(@\s*(?P<where>[^@:<>=!]*?)\s*)?(:\s*(?P<variant>[^<>]+?))?\s*"
    r"(?P<op><=|>=|<|>)\s*(?P<limit>[^<>=\s]+)\s*"
)


@dataclass(frozen=True)
class Grammar:
    """What conditions may name. whole: the variant where none is named; form: how one is written

    placeless: metrics that are one number, and so take no @WHERE
    others: further names, and of some of the metrics the variant where none is named
    """

    metrics: Mapping[str, Metric]
    whole: str
    form: str
    placeless: frozenset[str] = frozenset()
    others: Mapping[str, str] = field(default_factory=dict)

    def knows(self, name: str) -> bool:
        return name in self.metrics or name in self.others


OF_RUNS = Grammar(
    METRICS | EMBEDDING_METRICS | ATTENTION_METRICS, WHOLE, FORM, others=OF_REMOVALS | OF_ATTENTION
)
OF_CURVES = Grammar(METRICS, WHOLE, FORM)  # what is compared with a baseline


@dataclass(frozen=True)
class Condition:
    """`metric` at `where` of `variant` stands in the relation `op` to `limit`.

    where: a layer, one of WHERE, or "" where the metric is one number
    """

    text: str
    metric: str
    where: int | str
    variant: str
    op: str
    limit: float

    def holds(self, value: float) -> bool:
        return OPERATORS[self.op](value, self.limit)


@dataclass(frozen=True)
class Drop:
    """`metric` of `variant` gets worse by more than `most` against a baseline, at any layer."""

    metric: str
    variant: str
    most: float

    @property
    def text(self) -> str:
        of = "" if self.variant == WHOLE else f":{self.variant}"
        return f"drop of {self.metric}{of}>{self.most:g}"


def parse_condition(text: str, grammar: Grammar = OF_RUNS) -> Condition:
    """One `--fail-if`. RcProbeError, with the nearest name, for what is misspelt or can never tell anything."""
    where = f"--fail-if {text!s:.80}"
    if not isinstance(text, str):
        raise RcProbeError("it is no text", where=where, todo=f"Write {grammar.form}")
    match = _PATTERN.fullmatch(text)
    name = match.group("metric") if match else ""
    if not match or (match.group("where") is None and grammar.knows(name) and name not in grammar.placeless):
        raise RcProbeError(_why_not(text), where=where, todo=f"Write {grammar.form}")
    place, variant, op, number = match.group("where", "variant", "op", "limit")
    metric = name if name in grammar.others else _metric(name, where, grammar)
    limit = _number(number, where, grammar.form)
    if metric in grammar.metrics:
        _can_tell(grammar.metrics[metric], op, limit, where)
    at = _place(place, where, placeless=metric in grammar.placeless)
    return Condition(
        text.strip(), metric, at, variant or grammar.others.get(metric, grammar.whole), op, limit
    )


def _place(place: str | None, where: str, *, placeless: bool) -> int | str:
    """The number of a layer, one of WHERE, or "" for what is one number."""
    if placeless:
        if place is not None:
            raise RcProbeError("it is one number, of no layer", where=where, todo=f"Leave @{place} out")
        return ""
    name = place or ""
    numbered = name.isascii() and name.isdecimal() and len(name) <= MOST_DIGITS
    if not numbered and name not in WHERE:
        near = get_close_matches(name, WHERE, n=1)
        todo = f"Did you mean {near[0]!r}?" if near else f"Give a layer's number, or {', '.join(WHERE)}"
        raise RcProbeError(f"{name!r:.80} is no layer", where=where, todo=todo)
    return int(name) if numbered else name


def parse_drop(text: str | float, default: str = BULK) -> Drop:
    """One `--max-drop`: `0.05` (of the metric `default`), `cosine=0.02`, `residual:SAN=0.1`."""
    where = f"--max-drop {text!s:.80}"
    name, _, number = str(text).rpartition("=") if "=" in str(text) else (default, "", str(text))
    metric, _, variant = name.partition(":")
    metric = _metric(metric.strip(), where, OF_CURVES)
    if METRICS[metric].better is None:
        todo = f"Choose one of {', '.join(m.name for m in METRICS.values() if m.better)}"
        raise RcProbeError(f"more or less {metric} is neither better nor worse", where=where, todo=todo)
    most = _number(number.strip(), where)
    if most < 0:
        raise RcProbeError(f"{most:g} is below 0", where=where, todo="Give 0 or more")
    return Drop(metric, variant.strip() or WHOLE, most)


def _metric(name: str, where: str, grammar: Grammar) -> str:
    if name not in grammar.metrics:
        near = get_close_matches(name, [*grammar.metrics, *grammar.others], n=1)
        todo = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(grammar.metrics)}"
        raise RcProbeError(f"no metric is called {name!r:.80}", where=where, todo=todo)
    return name


def _number(text: str, where: str, form: str = FORM) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise RcProbeError(f"{text!r:.80} is not a number to compare with", where=where, todo=f"Write {form}")
    return number


def _why_not(text: str) -> str:
    """What is wrong with a text that is no condition."""
    if re.search(r"==|!=|<>|[^<>]=\s*[-\d.]+\s*$", text):
        return "measured numbers are never equal to a limit, so only < <= > >= are known"
    if not re.search("[<>]", text):
        return "nothing to compare with (without quotes the shell takes < and > for itself)"
    if "@" not in text:
        return "where is missing: @last, @min or @ and the number of a layer"
    return "it is not a condition"


def _can_tell(metric: Metric, op: str, limit: float, where: str) -> None:
    """Refuse a condition that holds always or never, whatever is measured."""
    low = -math.inf if (end := metric.low) is None else end
    high = math.inf if (end := metric.high) is None else end
    at_low, at_high = OPERATORS[op](low, limit), OPERATORS[op](high, limit)
    if at_low == at_high:
        span = f"{low:g} to {high:g}".replace("inf", "∞")
        said = "always holds" if at_low else "never holds"
        todo = "Give a limit inside this range"
        raise RcProbeError(f"it {said}, for {metric.name} lies in {span}", where=where, todo=todo)
