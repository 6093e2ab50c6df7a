"""The table `structure`: what attach found, one row per branch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from rc_probe.hooks.structure.structure import Structure
from rc_probe.results.tables import Row

FEW = 32  # numbers at each end of a parameter: reading whole weights would take longer than measuring them


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


def block_digests(structure: Structure) -> list[str] | None:
    """Of each block call a digest of a few of its weights, by which a block that two models share is known; None where weights are not at hand, as when they are offloaded."""
    try:
        return [_digest(structure.module(block).named_parameters()) for block in structure.blocks]
    except Exception:  # of a storage that cannot be read in parts, of any kind
        return None


def _digest(parameters: Iterable[tuple[str, Tensor]]) -> str:
    found = hashlib.sha256()
    for name, parameter in parameters:
        found.update(f"{name} {tuple(parameter.shape)}".encode())
        numbers: Tensor = parameter.detach().flatten()
        ends = torch.cat([numbers[:FEW], numbers[-FEW:]]).cpu()
        found.update(str(ends.double().tolist() if ends.is_floating_point() else ends.tolist()).encode())
    return found.hexdigest()[:16]
