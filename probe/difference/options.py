"""How two models are compared: the options of `rc-probe diff` and of `rc_probe.diff`. No torch: `--help` reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from rc_probe.common_options import DTYPES, MOST_SEED, ModelAndData
from rc_probe.hooks.errors import RcProbeError
from rc_probe.measures.curves import read_names
from rc_probe.options import flag, option
from rc_probe.registry import METRICS, select

SECOND = "The second model"
QUANTISED = {  # by the word of --quantise-b: the configuration of torchao
    "int8": "Int8DynamicActivationInt8WeightConfig",
    "int8-weights": "Int8WeightOnlyConfig",
}
QUANTISE_HELP = (
    "Quantise it with torchao: 'int8' (weights, and activations by token as it runs) or 'int8-weights'."
)
METRICS_HELP = (
    "Whose change is measured: names, separated by commas, or 'all'. (default: those that need no SVD)"
)
CKA_HELP = "Linear CKA by layer also where widths and depths agree; where they do not, it is measured anyway."
THRESHOLD_HELP = (
    "The report names the first layer whose relative difference (of CKA: 1 − CKA) is larger. (default: 0.05)"
)


@dataclass(frozen=True)
class DiffOptions(ModelAndData):
    """Both models, then what the second has of its own, then what is measured. None: as the first."""

    revision_b: str | None = option(None, "Its branch, tag or commit.", panel=SECOND)
    dtype_b: str | None = option(None, "Its dtype. (default: that of --dtype)", panel=SECOND)
    device_b: str | None = option(None, "Where it goes. (default: where the first is)", panel=SECOND)
    attention_b: str | None = option(None, "Its attention implementation: eager, sdpa …", panel=SECOND)
    quantise_b: str | None = option(None, QUANTISE_HELP, panel=SECOND)
    sensitivity: bool = option(
        True, "Each block and branch of the second model on what that of the first got."
    )
    cka: bool = option(False, CKA_HELP)
    metrics: tuple[str, ...] | None = option(
        None, METRICS_HELP, typed=str | None, read=read_names, words=lambda names, chosen: ["--metrics", ",".join(names)],
    )  # fmt: skip
    threshold: float = option(0.05, THRESHOLD_HELP, words=lambda value, chosen: ["--threshold", f"{value:g}"])
    seed: int = option(0, "Seed of the masks, where masked tokens are predicted.", least=0)

    def check(self) -> None:
        super().check()
        if self.seed >= MOST_SEED:
            raise RcProbeError(
                f"{self.seed} is too large", where="--seed", todo=f"Give less than {MOST_SEED}"
            )
        select(self.metrics)
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if not number or not math.isfinite(self.threshold) or self.threshold <= 0:
            raise RcProbeError(
                f"{self.threshold!r} is no threshold", where="--threshold", todo="Give a number above 0"
            )
        if self.dtype_b not in (None, *DTYPES):
            todo = f"Choose one of {', '.join(DTYPES)}"
            raise RcProbeError(f"no such dtype {self.dtype_b!r}", where="--dtype-b", todo=todo)
        if self.quantise_b not in (None, *QUANTISED):
            todo = f"Choose one of {', '.join(QUANTISED)}"
            raise RcProbeError(f"nothing is called {self.quantise_b!r}", where="--quantise-b", todo=todo)
        if self.device_map is not None and self.device_b is not None:
            todo = "The device map says where each part goes, of both models"
            raise RcProbeError("both are given", where="--device-b, --device-map", todo=todo)

    @property
    def measured(self) -> Sequence[str]:
        """The metrics whose change is measured, in display order."""
        names = select(self.metrics)
        return names if self.metrics else [name for name in names if METRICS[name].cost == "cheap"]

    @property
    def of_b(self) -> dict[str, Any]:
        """What the second model has of its own: by the name of the option without its `_b`."""
        return {
            each.name[:-2]: getattr(self, each.name)
            for each in fields(self)
            if each.name.endswith("_b") and getattr(self, each.name) is not None
        }

    def words_of_two(self, a: str, b: str) -> list[str]:
        """The command line that compares them like this."""
        return ["rc-probe", "diff", a, b, *(word for each in fields(self) for word in self._words(each))]


def option_of(name: str) -> str:
    """How an option is written."""
    return flag(next(each for each in fields(DiffOptions) if each.name == name))
