"""Masks: which keys each query may see, in place of the model's own mask.

Source: Wu et al. 2024, *On the role of attention masks and LayerNorm in transformers*: how fast tokens collapse depends
on who sees whom.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from .intervention import Intervention, Spec

if TYPE_CHECKING:
    from rc_probe.hooks.edits.edits import Edits
    from rc_probe.hooks.structure.structure import Structure

WHOLE, SIZED = ("complete", "causal"), ("window", "left", "sink")
FORMS = "complete, causal, window:8, left:8, or several such as sink:4,window:64"
_ONE = re.compile(r"(?P<kind>[a-z]+)(:(?P<size>\d{1,6}))?")


@dataclass(frozen=True)
class Masked(Intervention):
    """`mask@all=window:8`: each token sees 8 tokens to each side and itself. `sink:4,window:64` sees the first 4, too.

    Padding is never seen. Only `complete` lets a causal model look ahead: its loss then says nothing.
    """

    parts = {"mask": f"another attention mask: {FORMS}"}  # noqa: RUF012 - a constant
    sweep = ("complete", "causal", "window:8", "window:1", "left:8", "left:1")

    @classmethod
    def parse(cls, spec: Spec) -> Self:
        if spec.heads:
            raise spec.error("a mask is that of all heads of a block", f"Write mask@BLOCKS={FORMS}")
        sight_of(spec.value or "", spec)
        return cls(spec.part, spec.blocks, (), spec.value)

    def edits(self, structure: Structure) -> Edits:
        from rc_probe.hooks.edits.attention.masks import Sight, mask_edit
        from rc_probe.hooks.edits.attention.pass_inputs import PassInputs
        from rc_probe.hooks.edits.edits import Edits

        edits, inputs = Edits(), PassInputs(structure)
        edits.inputs.append(inputs)
        sight = Sight(**sight_of(self.value))
        for block, op in structure.attention_ops(self.blocks):
            edits.around_op(block.index, op, mask_edit(structure, block, op, sight, inputs))
        return edits


def sight_of(value: str, spec: Spec | None = None) -> dict[str, Any]:
    """The fields of `Sight` that a value means.

    >>> sight_of("sink:4,window:64")
    {'sinks': 4, 'window': 64}
    """
    spec = spec or Spec(f"mask={value}", "mask")
    found: dict[str, Any] = {}
    for text in value.split(","):
        match = _ONE.fullmatch(text.strip())
        kind, size = (match["kind"], match["size"]) if match else ("", None)
        if kind not in WHOLE + SIZED or (kind in WHOLE) != (size is None):
            raise spec.error(f"{text.strip()!r} is no mask", f"Give {FORMS}")
        if kind in found or (kind in WHOLE and "," in value):
            raise spec.error(f"{kind!r} cannot be joined with the rest of {value!r}", f"Give {FORMS}")
        found["sinks" if kind == "sink" else kind] = True if size is None else int(size)
    return found
