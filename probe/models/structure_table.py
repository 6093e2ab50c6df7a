"""What is known of a model before anything is measured: its entry in the results, and the table `structure`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rc_probe.hooks.structure.structure import Structure
from rc_probe.results.tables import Row

from .load import Loaded

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


def model_entry(loaded: Loaded, model: Any, structure: Structure, name: str) -> dict[str, Any]:
    """The entry of a model in the results; model: that of `loaded`."""
    heads = {b.ops[0].heads for block in structure.blocks for b in block.branches if b.ops and b.ops[0].heads}
    norms = [bool(j.norms) for block in structure.blocks for j in block.junctions]
    return {
        "id": name,
        "class": type(model).__name__,
        "model_type": getattr(model.config, "model_type", None),
        "revision": loaded.revision,
        "parameters": sum(p.numel() for p in model.parameters()),
        "blocks": structure.depth,
        "block_digests": block_digests(structure),
        "dim": structure.dim,
        "heads": heads.pop() if len(heads) == 1 else None,
        "signature": structure.signature,
        "norm": None if structure.mixed else "post-LN" if all(norms) else "mixed" if any(norms) else "pre-LN",
        "attention": getattr(model.config, "_attn_implementation", None),
        "stack": structure.name,
        "stacks": [*loaded.others, *structure.others],
        "proved": list(structure.proved),
    }
