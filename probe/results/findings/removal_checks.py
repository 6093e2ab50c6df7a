"""What `--fail-if` can say of removals: `importance@min<0.001`, `importance@12:mlp>0.5`, `drops@last>0.1`."""

from __future__ import annotations

from typing import Any

from rc_probe.hooks.errors import RcProbeError
from rc_probe.results.protocols import Measured, Result

from .drop_words import METHODS
from .importance_words import changes

PLACES = {"importance": "block", "drops": "removal"}  # what stands behind the @
PARTS = ("attention", "attention.skip", "cross", "cross.skip", "mixer", "mixer.skip", "mlp", "mlp.skip")


def plan_removals(text: str, name: str, variant: str, chosen: Measured) -> None:
    """RcProbeError for what these settings do not measure."""
    options: Any = chosen
    where = f"--fail-if {text}"
    if name == "drops":
        if options.drop is None and options.drop_until is None:
            raise RcProbeError("nothing is dropped", where=where, todo="Add --drop or --drop-until")
        known, todo = tuple(METHODS), f"There are {', '.join(METHODS)}"
    else:
        parts = options.parts_of(options.samples)
        if parts == "none":
            raise RcProbeError("importance is not measured", where=where, todo="Add --importance blocks")
        known = ("block", *PARTS) if parts == "parts" else ("block",)
        todo = f"There are {', '.join(known)}" + (
            "" if parts == "parts" else "; --importance parts measures branches and skips"
        )
    if variant not in known:
        raise RcProbeError(f"{name} of {variant!r} is not measured", where=where, todo=todo)


def of_removals(result: Result, name: str, variant: str) -> dict[int, float]:
    """The change of the loss, or of what stands for it, by block or by how many parts are gone (on samples held out)."""
    frame = result.declared[name].read(result.tables)
    if name == "importance":
        return changes(frame, variant)
    metric = (result.model.get("drops") or {}).get("criterion")
    rows = frame[(frame["method"] == variant) & (frame["split"] == "held_out") & (frame["metric"] == metric)]
    return {int(str(step)): float(own["change"].mean()) for step, own in rows.groupby("step")}
