"""A limit on what is left of a model: `loss>+0.1` (0.1 above the whole model), `accuracy<0.8`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from rc_probe.hooks.errors import RcProbeError
from rc_probe.results.conditions import OPERATORS

METRICS = ("loss", "kl", "embedding_distance", "accuracy", "agreement")
FORM = "METRIC OP NUMBER in quotes, with a sign for a change from the whole model: 'loss>+0.1', 'accuracy<0.8', 'agreement<-0.05'"
_PATTERN = re.compile(r"\s*(?P<metric>\w+)\s*(?P<op><=|>=|<|>)\s*(?P<sign>[+-]?)\s*(?P<number>\S+)\s*")


@dataclass(frozen=True)
class Limit:
    """metric op number; relative: of the change from the whole model."""

    metric: str
    op: str
    number: float
    relative: bool

    def passed(self, value: float, whole: float) -> bool:
        """Whether it holds for a value, where the whole model has `whole`."""
        return OPERATORS[self.op](value - whole if self.relative else value, self.number)


def parse_limit(text: str) -> Limit:
    """`--drop-until`. RcProbeError for what is misspelt."""
    where = f"--drop-until {text}"
    match = _PATTERN.fullmatch(text)
    if not match:
        raise RcProbeError("it is not a limit", where=where, todo=f"Write {FORM}")
    metric, op, sign, number = match.group("metric", "op", "sign", "number")
    if metric not in METRICS:
        raise RcProbeError(
            f"parts are not dropped by {metric!r}", where=where, todo=f"Choose one of {', '.join(METRICS)}"
        )
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RcProbeError(f"{number!r} is not a number", where=where, todo=f"Write {FORM}")
    return Limit(metric, op, -value if sign == "-" else value, bool(sign))
