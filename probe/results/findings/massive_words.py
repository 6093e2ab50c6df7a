"""What the tables say of massive tokens, in a sentence."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from rc_probe.registry import MASSIVE, WHOLE
from rc_probe.results.curves import Curve, curves
from rc_probe.results.protocols import Result
from rc_probe.results.verdict import level_of
from rc_probe.results.words import THINGS, many, number

SHOWN = 3  # tokens of the sentence


def judge_massive(result: Result) -> dict[str, Any] | None:
    """Which tokens are massive, from which layer to which; and where another bound would give another level."""
    frame = result.declared["massive"].read(result.tables)
    frame = frame[frame["norm_over_median"].notna()]
    if frame.empty:
        return None
    count = int(result.settings.get("samples") or frame["samples"].max())
    things = THINGS.get(str(result.settings.get("modality")), "samples")
    parts = [_told(name, rows, count, things) for name, rows in groups(frame)]
    shown, more = parts[:SHOWN], len(parts) - SHOWN
    others = f"; and {many(more, 'others')}" if more > 0 else ""
    return {
        "sentence": f"Massive tokens, of over {MASSIVE} times the median norm: {'; '.join(shown)}{others}.",
        "reasons": [
            "Many trained models have such tokens, often as places that attention goes to when it needs no other: no defect.",
            *_other_bounds(result),
        ],
    }  # fmt: skip


def groups(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Rows that one phrase tells: of one position whatever stands there, or of one token wherever it stands."""
    found, left = [], frame
    while len(left):
        sizes = {
            (by, key): rows["samples"].sum() for by in ("position", "token") for key, rows in left.groupby(by)
        }
        by, key = max(sizes, key=lambda one: (sizes[one], one[0] == "position", -len(str(one[1]))))
        here = left[by] == key
        found.append((_name(by, key, left[here]), left[here]))
        left = left[~here]
    return found


def _name(by: str, key: Any, rows: pd.DataFrame) -> str:
    if by == "token":
        return f"the token “{str(key).strip() or key}”"
    tokens = [text for text in rows["token"].unique() if isinstance(text, str) and text.strip()]
    return f"position {int(key)}" + (f" (“{tokens[0].strip()}”)" if len(tokens) == 1 else "")


def _told(name: str, rows: pd.DataFrame, count: int, things: str) -> str:
    """`position 1 in 8 of 8 texts, layers 12 to 29, up to 183 times`."""
    samples = min(int(rows.groupby("layer")["samples"].sum().max()), count)
    low, high = int(rows["layer"].min()), int(rows["layer"].max())
    layers = f"layer {low}" if low == high else f"layers {low} to {high}"
    most = number(float(rows["norm_over_median"].max()), 3)
    return f"{name} in {samples} of {many(count, things)}, {layers}, up to {most} times"


def _other_bounds(result: Result) -> list[str]:
    """Where the level would be another with another bound."""
    frame = result.declared["massive_levels"].read(result.tables)
    frame = frame[frame["mean"].notna()]
    key = ("pretrained", WHOLE)
    cosine = curves(result, "cosine_bulk").get(key)
    levels: dict[int, str | None] = {}
    for bound, rows in frame.sort_values("layer").groupby("massive"):
        layers, means, floors = (rows[name].tolist() for name in ("layer", "mean", "floor"))
        curve = Curve(
            [*map(int, layers)], [*map(float, means)], [math.nan] * len(means), [*map(float, floors)]
        )
        levels[int(str(bound))] = level_of(curve, cosine)
    usual = levels.get(MASSIVE)
    return [
        f"The level would be {level} if tokens of over {bound} times the median counted as massive."
        for bound, level in levels.items()
        if level != usual
    ]
