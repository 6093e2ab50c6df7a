"""How the attention ops of a model are owned, proved at attach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from rc_probe.hooks.edits.block_mode import Routed
from rc_probe.hooks.edits.edits import Editing, Edits
from rc_probe.hooks.errors import reason
from rc_probe.hooks.structure.structure import (
    INTERFACE,
    AttentionOp,
    Candidate,
    CandidateBlock,
    CandidateBranch,
)


class _Routing(Editing):
    """Edits with the interface owned; `found` has the calls of the interface in each block call."""

    def __init__(self, structure: Candidate, edits: Edits) -> None:
        super().__init__(structure, edits, own=True)
        self.found: dict[int, list[Routed]] = {}

    def leave(self, block: CandidateBlock, output: Any) -> None:
        self.found[block.index] = self._modes[-1].routed
        super().leave(block, output)


def gated_pass(
    candidate: Candidate,
    edits: Edits,
    run: Callable[[], list[Tensor]],
    is_plain: Callable[[list[Tensor]], bool],
) -> tuple[Candidate, list[Tensor]]:
    """The output of `run()` under `edits`, which change nothing; and the candidate with the owners of its attention ops.

    The interface is owned in this pass. Only where that fails or changes the output, another follows
    without it, and `unowned` of the candidate says why.
    """
    routing = _Routing(candidate, edits)
    try:
        with routing:
            out = run()
        why = "with it owned, the output changes"
    except Exception as error:  # whatever this model's code makes of our name
        out, why = [], f"with it owned, the forward pass fails ({reason(error)})"
    if out and is_plain(out):
        blocks = tuple(_owned(b, routing.found.get(b.index, [])) for b in candidate.blocks)
        return replace(candidate, blocks=blocks), out
    with Editing(candidate, edits):
        return replace(candidate, unowned=why), run()


def _owned(block: CandidateBlock, calls: list[Routed]) -> CandidateBlock:
    """The block, those of its branches owned by the interface all of whose ops ran inside calls of it."""

    def owned(branch: CandidateBranch) -> CandidateBranch:
        holding = [
            {i for i, c in enumerate(calls) if c.heads and c.first <= op.ordinal < c.last}
            for op in branch.ops
        ]
        if not branch.ops or not all(holding):
            return branch
        ops = (AttentionOp(i, INTERFACE, calls[i].heads) for i in sorted(set().union(*holding)))
        return replace(branch, ops=tuple(ops))

    junctions = (replace(j, branches=tuple(map(owned, j.branches))) for j in block.junctions)
    return replace(block, junctions=tuple(junctions), routed=len(calls))
