"""The table `structure`: what attach found, one row per branch."""

from __future__ import annotations

from rc_probe.hooks.structure.structure import Structure
from rc_probe.results.tables import Row


def structure_rows(structure: Structure) -> list[Row]:
    """Rows of the table `structure`."""
    return [
        {
            "block": block.index + 1, "name": block.name, "call": block.turn + 1, "junction": number + 1,
            "kind": branch.kind, "norm_after": ", ".join(n.name for n in junction.norms) or None,
            "parallel": len(junction.branches) > 1, "heads": (branch.ops[0].heads or None) if branch.ops else None,
            "attention_op": branch.ops[0].via if branch.ops and branch.kind in ("attention", "cross") else None,
        }
        for block in structure.blocks
        for number, junction in enumerate(block.junctions)
        for branch in junction.branches
    ]  # fmt: skip
