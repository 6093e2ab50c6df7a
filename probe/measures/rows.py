"""Rows of the tables `ablations` and `structure`."""

from __future__ import annotations

from collections.abc import Sequence

from rc_probe.hooks.structure.structure import Structure
from rc_probe.registry import PAPER
from rc_probe.results.tables import Row

from .curves import Curves
from .variants import Variant, span


def ablation_rows(curves: dict[str, Curves], variants: Sequence[Variant], depth: int) -> list[Row]:
    """Rows of the table `ablations`: every variant against the transformer, at the last layer."""
    base = {row["metric"]: row["mean"] for row in curves["transformer"].rows() if row["layer"] == depth}
    rows = []
    for variant in variants:
        if not variant.gates:
            continue
        paper = variant.name in PAPER
        spans = dict.fromkeys(span(g.blocks) for g in variant.gates)
        heads = [span(g.heads) for g in variant.gates if g.heads]
        component = variant.name if paper else "+".join(dict.fromkeys(g.component for g in variant.gates))
        for row in curves[variant.name].rows():
            if row["layer"] == depth:
                value, metric = row["mean"], row["metric"]
                rows.append(
                    {
                        "component": component, "layer": "+".join(spans), "head": "+".join(heads) or None,
                        "metric": metric, "value": value, "baseline": base[metric], "change": value - base[metric],
                    }
                )  # fmt: skip
    return rows


def structure_rows(structure: Structure) -> list[Row]:
    """Rows of the table `structure`: what attach found, one row per branch."""
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
