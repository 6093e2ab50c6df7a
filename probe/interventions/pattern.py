"""Patterns of attention moved away from uniform ones: cures that were proposed for collapse and over-smoothing.

`centred`: A − J, J uniform over the keys that each query may see (collapse in width). `sharpened:λ`: J + (1 + λ)(A − J)
(AttnScale, over-smoothing in vision).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from .intervention import Intervention, Spec, finite

if TYPE_CHECKING:
    from rc_probe.hooks.edits.edits import Edits
    from rc_probe.hooks.structure.structure import Structure

CENTRED, SHARPENED = "centred", "sharpened:"
TODO = "Write pattern@all=centred, or pattern@all=sharpened:0.5"


@dataclass(frozen=True)
class Pattern(Intervention):
    """`pattern@all=centred`, `pattern@3-6=sharpened:0.5`. `sharpened:0` is the model as it is."""

    parts = {"pattern": "attention patterns: centred, or sharpened:0.5"}  # noqa: RUF012 - a constant
    sweep, own = tuple(f"{SHARPENED}{x}" for x in (-0.5, -0.25, 0, 0.25, 0.5, 1)), f"{SHARPENED}0"

    @classmethod
    def parse(cls, spec: Spec) -> Self:
        if spec.heads:
            raise spec.error("a pattern is that of all heads of a block", TODO)
        _weights(spec.value or "", spec)
        return cls(spec.part, spec.blocks, (), spec.value)

    def edits(self, structure: Structure) -> Edits:
        from rc_probe.hooks.edits.attention.changes import pattern_edit
        from rc_probe.hooks.edits.edits import Edits

        edits = Edits()
        weights = _weights(self.value, Spec(self.label, self.part))
        for block, op in structure.attention_ops(self.blocks):
            edits.around_op(block.index, op, pattern_edit(op.heads, *weights), inner=True)
        return edits


def _weights(value: str, spec: Spec) -> tuple[float, float]:
    """What A and J are taken times."""
    if value == CENTRED:
        return 1.0, -1.0
    if not value.startswith(SHARPENED):
        raise spec.error(f"{value!r} is no pattern", TODO)
    strength = finite(value.removeprefix(SHARPENED), spec, TODO)
    return 1 + strength, -strength
