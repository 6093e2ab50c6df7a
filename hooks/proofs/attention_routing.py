"""How the attention ops of a model are owned, proved at attach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rc_probe.hooks.edits.block_mode import Routed
from rc_probe.hooks.edits.edits import Editing, Edits
from rc_probe.hooks.structure.structure import INTERFACE, AttentionOp, Block, Structure

# ---- at attach


class _Routing(Editing):
    """Edits with the interface owned; `found` has the calls of the interface in each block call."""

    def __init__(self, structure: Structure, edits: Edits) -> None:
        super().__init__(structure, edits, own=True)
        self.found: dict[int, list[Routed]] = {}

    def leave(self, block: Block, output: Any) -> None:
        self.found[block.index] = self._modes[-1].routed
        super().leave(block, output)


def gated_pass(
    structure: Structure,
    edits: Edits,
    run: Callable[[], list[Tensor]],
    is_plain: Callable[[list[Tensor]], bool],
) -> list[Tensor]:
    """The output of `run()` under `edits`, which change nothing; and each branch's ops told how they are owned.

    The interface is owned in this pass. Only where that fails or changes the output, another follows
    without it.
    """
    routing = _Routing(structure, edits)
    try:
        with routing:
            out = run()
    except Exception:  # whatever this model's code makes of our name
        out = []
    if out and is_plain(out):
        for block in structure.blocks:
            _assign(block, routing.found.get(block.index, []))
        return out
    with Editing(structure, edits):
        return run()


def _assign(block: Block, calls: list[Routed]) -> None:
    """Branches all of whose ops ran inside calls of the interface are owned by it."""
    block.routed = len(calls)
    for branch in block.branches:
        holding = [
            {i for i, c in enumerate(calls) if c.heads and c.first <= op.ordinal < c.last}
            for op in branch.ops
        ]
        if branch.ops and all(holding):
            branch.ops = tuple(
                AttentionOp(i, INTERFACE, calls[i].heads) for i in sorted(set().union(*holding))
            )
