"""`--log-with`: the finished tables handed to experiment trackers, through accelerate's own."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rc_probe.hooks.errors import RcProbeError

if TYPE_CHECKING:
    from rc_probe.result import ProbeResult

PROJECT = "rc-probe"
VERDICT = ("value", "entered", "lowest", "lowest_layer", "floor", "layers")


def check_trackers(names: Sequence[str], *, alone: bool = True) -> None:
    """RcProbeError for a tracker that accelerate does not know, or whose package is missing here.

    alone: whether one process measures one model.
    """
    if not names:
        return
    if not alone:
        what = "trackers get the result of one model measured by one process"
        raise RcProbeError(
            what, where="--log-with", todo="Leave it out of runs of several models or processes"
        )
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    there = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            todo = f"Choose one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            raise RcProbeError("no such tracker", where=f"--log-with {name}", todo=todo)
        if name not in there:
            raise RcProbeError(
                "its package is missing", where=f"--log-with {name}", todo=f"pip install {name}"
            )


def log_result(result: ProbeResult, names: Sequence[str], folder: Path) -> None:
    """One run in each tracker: every curve as a chart by layer, the verdict's numbers, the settings.

    A curve is called metric/weights/variant and has layer l at step l; the verdict's numbers are
    verdict/…, at step 0. Trackers that write files do so in `folder`.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=not result.settings.get("device", "cpu").startswith("cuda"),
        log_with=list(dict.fromkeys(names)), project_dir=folder,
    )  # fmt: skip
    accelerator.init_trackers(PROJECT, config=_config(result))
    try:
        for step, values in _records(result):
            accelerator.log(values, step=step)
    finally:
        accelerator.end_training()


def _records(result: ProbeResult) -> Iterator[tuple[int, dict[str, float]]]:
    rows = result.tables["residuals"].dropna(subset="mean")
    verdict = {
        f"verdict/{key}": float(result.verdict[key]) for key in VERDICT if _number(result.verdict.get(key))
    }
    for layer in sorted(rows["layer"].unique()):
        group = rows[rows["layer"] == layer]
        values = {
            plain(f"{metric}/{weights}/{variant}"): float(mean)
            for metric, weights, variant, mean in zip(
                group["metric"], group["weights"], group["variant"], group["mean"], strict=True
            )
        }
        yield int(layer), values | (verdict if layer == 0 else {})


def plain(name: str) -> str:
    """A name that every tracker takes: MLflow has letters, digits and -_. :/ only."""
    return re.sub(r"[^\w\-. :/]", "-", name, flags=re.ASCII)


def _config(result: ProbeResult) -> dict[str, Any]:
    """Model and settings as a flat table of plain values, as trackers want it."""
    found = {**{f"model_{key}": value for key, value in result.model.items()}, **result.settings}
    return {key: value for key, value in found.items() if isinstance(value, str | int | float)}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
