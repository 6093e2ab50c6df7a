"""Gates: a branch, a skip, a sublayer, a head or a whole block times a number; 1 keeps, 0 removes exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from rc_probe.hooks.components import COMPONENTS, ONLY_REMOVED

from .intervention import Intervention, Spec, span

if TYPE_CHECKING:
    from rc_probe.hooks.edits.edits import Edits
    from rc_probe.hooks.structure.structure import Structure


@dataclass(frozen=True)
class Gated(Intervention):
    """`mlp@7`, `head@2:5=0.5`, `block@5-8`. value: a number, or from Python a tensor (batch,), one gate per sample."""

    value: Any = 0.0

    parts = COMPONENTS
    sweep, own = ("0", "0.25", "0.5", "0.75", "0.9", "1", "1.1"), 1.0

    @classmethod
    def parse(cls, spec: Spec) -> Self:
        if (spec.part == "head") != bool(spec.heads):
            head = spec.part == "head"
            raise spec.error("heads are named as head@BLOCK:HEAD" if head else "only 'head' takes :HEADS")
        return cls(spec.part, spec.blocks, spec.heads, 0.0 if spec.value is None else _number(spec))

    @property
    def label(self) -> str:
        heads = f":{span(self.heads)}" if self.heads else ""
        value = "" if isinstance(self.value, int | float) and self.value == 0 else f"={self.value}"
        return f"{self.part}@{span(self.blocks)}{heads}{value}"

    def edits(self, structure: Structure) -> Edits:
        from rc_probe.hooks.edits.gates import Gate, gate_edits

        return gate_edits(structure, [Gate(self.part, self.blocks, self.heads, self.value)])


def _number(spec: Spec) -> float:
    try:
        gate = float(spec.value or "")
    except ValueError:
        raise spec.error(f"the gate {spec.value!r} is not a number") from None
    if not math.isfinite(gate):
        raise spec.error(f"the gate {spec.value!r} is not a finite number")
    if spec.part in ONLY_REMOVED and gate != 0:
        raise spec.error(f"{spec.part!r} can only be removed", "Scale its branches instead, such as mlp=0.5")
    return gate
