"""The paper's four variants (Dong et al. 2021, figure 2) of a model at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rc_probe.registry import PAPER, WHOLE

from .gate import Gated
from .intervention import Intervention, Variant

if TYPE_CHECKING:
    from rc_probe.hooks.structure.structure import Structure


def paper_variants(structure: Structure) -> list[Variant]:
    """`SAN`, `SAN+MLP`, `SAN+skip` and `transformer` for this model.

    Two switches: the attention skip, and the MLP sublayer as a whole. In a parallel block there is
    one skip, the attention skip. In a block without attention it is the skip around its mixer (state
    space, convolution). Blocks without an MLP have nothing to switch off.

    Of a model whose blocks mix several streams, the `transformer` alone: nothing in it can be switched off.

    Raises RcProbeError where no branch moves anything between tokens.
    """
    if structure.mixed:
        return [Variant(WHOLE)]
    attending = [b for b in structure.blocks if any(branch.kind == "attention" for branch in b.branches)]
    mixing = [
        b for b in structure.blocks if b not in attending and any(x.kind == "mixer" for x in b.branches)
    ]
    if not attending and not mixing:
        raise structure.error(
            structure.blocks[0],
            f"no branch of the model moves anything between tokens ({structure.signature})",
            "Choose a model with attention or another mixer",
        )
    no_skip: tuple[Intervention, ...] = (Gated("attention.skip"),) if attending else ()
    no_skip += (Gated("mixer.skip", tuple(b.index + 1 for b in mixing)),) if mixing else ()
    has_mlp = any(branch.kind == "mlp" for block in structure.blocks for branch in block.branches)
    no_mlp = (Gated("mlp.sublayer"),) if has_mlp else ()
    return [
        Variant(name, given)
        for name, given in zip(PAPER, (no_skip + no_mlp, no_skip, no_mlp, ()), strict=True)
    ]


def mixer_note(structure: Structure) -> str | None:
    """What the variants mean where blocks have no attention; None where all have."""
    without = [b for b in structure.blocks if all(branch.kind != "attention" for branch in b.branches)]
    if not without or structure.mixed:
        return None
    return (
        f"{len(without)} of {structure.depth} blocks have no attention: there the variants switch the skip around "
        "the mixer, and what holds for attention alone (heads, the recursion, the bound) does not apply."
    )
