"""What single paths rest on, proved on the model at hand the first time that one is asked for."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.frozen.frozen_pass import TOLERANCE, Hop, Step, frozen, hop_edits
from rc_probe.hooks.frozen.parts import Ledger, Parts
from rc_probe.hooks.structure.structure import Structure

from .decompose import first_axes, frozen_lengths

# What was proved before: branches that carry nothing past their heads, blocks nothing past these steps.
heads_alone: weakref.WeakSet[Structure] = weakref.WeakSet()
steps_alone: weakref.WeakKeyDictionary[Structure, set[tuple[tuple[int, int, int], ...]]] = (
    weakref.WeakKeyDictionary()
)

TODO = "Its single paths cannot be told apart; the exact lengths can"


def prove_heads(structure: Structure, batch: dict[str, Any], choices: list[Step]) -> None:
    """RcProbeError where an attention branch carries the stream past its heads: that would count with each of them.

    With every head off, nothing of the stream is left in the branch. Once for a structure.
    """
    if structure in heads_alone:
        return
    ledger = Ledger(fixed=1)

    def on_hop(number: int, hop: Hop, x: Parts) -> Parts:
        if hop.ops and float(x.parts.abs().max()) > 1e-5 * float(x.value.abs().max()):
            raise structure.error(
                structure.blocks[choices[number].block],
                "its attention branch carries the stream past its heads, too",
                TODO,
            )
        return x

    def chosen(number: int, hop: Hop) -> Tensor:
        return torch.zeros(1, hop.heads, dtype=torch.bool)

    frozen(structure, batch, ledger, lambda x: x[None], hop_edits(structure, choices, on_hop, chosen=chosen))
    heads_alone.add(structure)


def prove_steps(structure: Structure, batch: dict[str, Any], choices: list[Step]) -> None:
    """RcProbeError where the stream goes on by other ways than the steps of its paths. Once for a structure and its steps.

    Where every hop is weighed by a and all that goes by by b, the output is the sum over k of a^k b^(L - k) S_k, S_k the
    exact part of length k. What passes a step by, such as a skip around several blocks, does not obey this.
    """
    key = tuple((step.block, step.junction, step.heads) for step in choices)
    known = steps_alone.setdefault(structure, set())
    if key in known:
        return
    a, b = 0.5, -1.0
    edits = hop_edits(
        structure,
        choices,
        lambda number, hop, x: x.made(lambda p: p * a),
        on_others=lambda number, x: x.made(lambda p: p * b),
    )
    weighed = frozen(structure, batch, Ledger(fixed=1), lambda x: x[None], edits)
    lengths = frozen_lengths(structure, batch, choices)
    last, depth = structure.blocks[-1], len(choices)
    for found, parts in zip(first_axes(weighed, last), first_axes(lengths, last), strict=True):
        each = parts[1:-1]  # without what comes from biases, and the sum
        wanted = sum(a**k * b ** (depth - k) * part for k, part in enumerate(each))
        off = float((found[0] - wanted).abs().max()) / (float(each.abs().max()) or 1.0)
        if not off <= TOLERANCE[found.dtype]:
            raise RcProbeError(
                "its stream also goes on by other ways than the skips and branches of its blocks, one after the other",
                where=type(structure.model).__name__,
                todo=TODO,
            )
    known.add(key)
