"""What the table `drops` says: which list won on the samples that chose it, and what it costs on the others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rc_probe.results.protocols import Result
from rc_probe.results.words import many, signed

from .importance_words import SUBJECTS, UNITS

if TYPE_CHECKING:
    import pandas as pd

METHODS = {
    "greedy": "removal one by one", "angular": "the window of least angular distance", "random": "a random order",
}  # fmt: skip
THINGS = {"attention": "attention branch", "mlp": "MLP branch"}


def judge_drops(result: Result) -> dict[str, Any] | None:
    """The list that won, its cost where it was chosen and where it was not, and the other methods beside it."""
    facts = result.model.get("drops")
    if not facts:
        return None
    frame, metric = result.declared["drops"].read(result.tables), str(facts["criterion"])
    limit = result.settings.get("drop_until")
    if not facts["removed"]:
        return {"sentence": f"Nothing can go: the first removal already has {limit}.", "reasons": []}
    steps, unit = int(facts["removed"]), UNITS.get(metric, "")
    last = frame[(frame["metric"] == metric) & (frame["step"] == steps)]
    draw = facts.get("draw")
    mine = last[
        (last["method"] == facts["method"]) & (last["draw"].isna() if draw is None else last["draw"] == draw)
    ]
    chosen, held = (_cost(mine[mine["split"] == split]) for split in ("chosen", "held_out"))
    names = listed(facts["list"])
    sentence = (
        f"Without {names} {SUBJECTS[metric]} changes by {signed(held)}{unit} on samples that did not choose "
        f"({signed(chosen)}{unit} on those that did)."
    )
    return {
        "sentence": sentence, "held_out": held, "chosen": chosen,
        "reasons": [*_methods(last, facts, unit), *_limit(steps, limit), *_forms(facts)],
    }  # fmt: skip


def listed(parts: list[dict[str, Any]]) -> str:
    """`blocks 3, 5 and 8`; `attention branches of blocks 2 and 7, and MLP branches of block 4`."""
    found = []
    for component in dict.fromkeys(part["component"] for part in parts):
        numbers = sorted(int(part["block"]) for part in parts if part["component"] == component)
        blocks = f"block{'s' if len(numbers) > 1 else ''} {_and(list(map(str, numbers)))}"
        many_of = "es" if len(numbers) > 1 else ""
        found.append(blocks if component == "block" else f"the {THINGS[component]}{many_of} of {blocks}")
    return ", and ".join(found)


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _cost(rows: pd.DataFrame) -> float:
    return float(rows["change"].iloc[0]) if len(rows) else math.nan


def _methods(last: pd.DataFrame, facts: dict[str, Any], unit: str) -> list[str]:
    """What each method's list costs, on both halves."""
    parts = []
    for method, told in METHODS.items():
        rows = last[last["method"] == method]
        costs = [rows[rows["split"] == split]["change"].mean() for split in ("chosen", "held_out")]
        if len(rows):
            name = "random orders (mean)" if method == "random" else told
            parts.append(f"{name} {signed(float(costs[1]))}{unit} (where chosen {signed(float(costs[0]))})")
    best = "a random order" if facts["method"] == "random" else METHODS[str(facts["method"])]
    return [
        f"On samples held out: {'; '.join(parts)}. The list is that of {best}, which costs least where it was chosen."
    ]


def _limit(steps: int, limit: Any) -> list[str]:
    return (
        [f"After {many(steps, 'removals')} the next one would have {limit}, or none is left."]
        if limit
        else []
    )


def _forms(facts: dict[str, Any]) -> list[str]:
    if facts.get("refused"):
        return [f"No smaller model is written: {facts['refused']}."]
    names = _and([str(name) for name in facts.get("forms") or {}])
    return [
        f"What builds the smaller model stands in results.json, model.drops.forms: {names}; it gives what the gated model gives."
    ]
