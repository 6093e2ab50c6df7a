"""What `--fail-if` can say of attention: `sink_share@max>0.9`, `entropy@min:least<0.01`, `phase@3:7>2`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rc_probe.hooks.errors import RcProbeError
from rc_probe.results.protocols import Measured, Result

MEAN = "mean"
OF_HEADS: dict[str, Callable[[Any], Any]] = {
    MEAN: max,
    "least": min,
    "most": max,
}  # of what a block's heads have


def plan_attention(text: str, name: str, variant: str, chosen: Measured) -> None:
    """RcProbeError for what these settings do not measure."""
    options: Any = chosen
    where = f"--fail-if {text}"
    if not options.attention:
        raise RcProbeError(f"{name} is not measured", where=where, todo="Leave --no-attention out")
    if variant not in OF_HEADS and not (variant.isascii() and variant.isdecimal() and int(variant)):
        todo = f"There are {', '.join(OF_HEADS)}, or the number of a head"
        raise RcProbeError(f"{name} of {variant!r} is not measured", where=where, todo=todo)


def of_attention(result: Result, name: str, variant: str) -> dict[int, float]:
    """The metric of self-attention by block: mean over its heads, the least, the most, or that of one head."""
    from .attention_words import heads_of  # which needs pandas, and this is read by --help

    frame = result.declared["attention"].read(result.tables)
    rows = heads_of(frame, name)
    if variant == MEAN:
        mine = (frame["metric"] == name) & (frame["component"] == "attention") & frame["head"].isna()
        rows = frame[mine & frame["mean"].notna()]
    elif variant not in OF_HEADS:
        rows = rows[rows["head"] == int(variant)]
    pick = OF_HEADS.get(variant, max)
    return {int(str(block)): float(pick(own["mean"])) for block, own in rows.groupby("block")}
