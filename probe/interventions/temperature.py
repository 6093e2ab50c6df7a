"""Temperature: the scaled scores of attention are divided by it. Low ones sharpen patterns, high ones flatten them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from .intervention import Intervention, Spec, number

if TYPE_CHECKING:
    from rc_probe.hooks.edits.edits import Edits
    from rc_probe.hooks.structure.structure import Structure

TODO = "Write temperature@all=0.5"


@dataclass(frozen=True)
class Temperature(Intervention):
    """`temperature@all=0.5`: before position biases, soft caps and masks. 1 is the model as it is."""

    value: float = 1.0

    parts = {"temperature": "the scaled attention scores are divided by it"}  # noqa: RUF012 - a constant
    sweep, own = ("0.125", "0.25", "0.5", "1", "2", "4", "8"), 1.0

    @classmethod
    def parse(cls, spec: Spec) -> Self:
        if spec.heads:
            raise spec.error("a temperature is that of all heads of a block", TODO)
        value = number(spec, TODO)
        if value <= 0:
            raise spec.error(f"the temperature {spec.value!r} is not above 0", TODO)
        return cls(spec.part, spec.blocks, (), value)

    def edits(self, structure: Structure) -> Edits:
        from rc_probe.hooks.edits.attention.changes import temperature_edit
        from rc_probe.hooks.edits.edits import Edits

        edits = Edits()
        for block, op in structure.attention_ops(self.blocks):
            if op.via == "softmax":
                raise structure.error(
                    block,
                    "its attention adds biases and masks before the operation that is seen, so its scaled scores cannot be divided",
                    "Load the model with attn_implementation='sdpa' or 'eager', or leave the temperature out",
                )
            edits.around_op(block.index, op, temperature_edit(self.value))
        return edits
