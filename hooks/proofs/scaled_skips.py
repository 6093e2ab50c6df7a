"""Blocks whose skips carry the stream times a fixed factor (Doge, RWKV), or through a fixed affine map."""

from __future__ import annotations

import torch
from torch import Tensor

from rc_probe.hooks.edits.edits import FIRST, Edits, zero
from rc_probe.hooks.structure.structure import REPORT, CandidateBlock, CandidateJunction

from .replay import Replay, noise_like, tolerance


def prove_scaling(blocks: Replay, block: CandidateBlock, x: Tensor) -> None:
    """With every branch off and its norms left out, the block is a fixed affine map of each element.

    Shown on three inputs: each element of the output is that of the input which has the same element,
    whatever the other elements are, and it grows in proportion. Then no skip adds anything but its
    own part to what the branches add.

    Raises RcProbeError when it is not so.
    """
    scale = float(x.abs().amax())
    y = noise_like(x)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device) < 0.5

    def run(stream: Tensor, *kept: CandidateJunction, skip: bool = True) -> Tensor:
        return blocks.run(block, stream, _without(block, kept, skip=skip))

    def close(a: Tensor, b: Tensor) -> bool:
        size = max(scale, float(a.abs().amax()), float(b.abs().amax()))
        return torch.allclose(a, b, rtol=0, atol=8 * tolerance(x) * size)

    of_x, of_y = run(x), run(y)
    elementwise = torch.equal(run(torch.where(mask, x, y)), torch.where(mask, of_x, of_y))
    if not elementwise or not close(run((x + y) / 2), (of_x + of_y) / 2):
        norms = any(j.norms for j in block.junctions)
        first = block.normed_before
        why = f": the stream itself goes through the norm {first} before the first add" if first else ""
        raise blocks.structure.error(
            block,
            f"with every branch off it is not {'its norms applied to its input' if norms else 'the identity'}, "
            f"or a fixed scaling of it (adds at {', '.join(j.where for j in block.junctions)}){why}",
            f"This block cannot be probed exactly. {REPORT}",
        )
    for junction in block.junctions:
        both, alone = run(x, junction), run(x, junction, skip=False)
        nothing = blocks.run(block, x, _without(block, (), skip=True, gone=junction))
        if not close(both - of_x, alone - nothing):
            raise blocks.structure.error(
                block,
                f"with the skip at {junction.where} off, not the branch alone goes on",
                f"This block cannot be probed exactly. {REPORT}",
            )


def _without(
    block: CandidateBlock,
    kept: tuple[CandidateJunction, ...],
    *,
    skip: bool,
    gone: CandidateJunction | None = None,
) -> Edits:
    """Every norm left out and every branch off but those of `kept`, whose skip goes unless `skip`; and that of `gone`."""
    edits = Edits()
    if block.norms:
        edits.bypass.add((block.index, FIRST))
    for index, junction in enumerate(block.junctions):
        if junction.norms:
            edits.bypass.add((block.index, index))
        if junction not in kept:
            for branch in junction.branches:
                edits.at(branch.site, zero)
        if junction is gone or (junction in kept and not skip):
            edits.at(junction.skip, zero)
    return edits
