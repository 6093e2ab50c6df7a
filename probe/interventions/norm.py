"""Norms: what stands in place of every norm on the stream, or at a branch's input.

Source: Wu et al. 2024, *On the role of attention masks and LayerNorm in transformers*: norms can keep tokens from collapsing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from .intervention import Intervention, Spec

if TYPE_CHECKING:
    from rc_probe.hooks.edits.edits import Edits
    from rc_probe.hooks.structure.structure import Structure

FORMS = ("identity", "frozen", "no-affine", "center", "scale")
TODO = f"Write norm@all= and one of {', '.join(FORMS)}"


@dataclass(frozen=True)
class Normed(Intervention):
    """`norm@all=identity`, `norm@3-6=frozen`.

    identity: left out. frozen: divided by the scale of the plain pass on the same inputs, so that it is linear.
    no-affine: without gain and bias. center: the mean over features is taken off, and no more. scale: divided by the
    root mean square, and no more.
    """

    parts = {"norm": f"norms on the stream and at branches' inputs: {', '.join(FORMS)}"}  # noqa: RUF012 - a constant
    sweep = FORMS

    @classmethod
    def parse(cls, spec: Spec) -> Self:
        if spec.heads:
            raise spec.error("a norm is that of a whole block", TODO)
        if spec.value not in FORMS:
            raise spec.error(f"{spec.value or ''!r} is nothing that a norm can be", TODO)
        return cls(spec.part, spec.blocks, (), spec.value)

    def edits(self, structure: Structure) -> Edits:
        from rc_probe.hooks.edits.norms.norm_edits import norm_edits

        return norm_edits(structure, self.blocks, self.value)
