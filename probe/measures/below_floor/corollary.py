"""Corollary 3.2 (Dong et al. 2021) of a model's SAN+MLP: what MLPs hold against the collapse, layer by layer.

X' = f(Σ_h P_h X W_h), f with the Lipschitz constant λ: the base of theorems 2.2 and 2.3 gains λ. The residual here is about the
token mean, on which f gives at most 2λ times as much (rc_probe.measures.below_floor.mlp_lipschitz): the base is 2λ · 4γβH/√d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.proofs.replay import Replay, token_axis
from rc_probe.hooks.split.rules import Split
from rc_probe.hooks.structure.structure import Block, Structure
from rc_probe.metrics.norms import composite_norm
from rc_probe.results.tables import Row

from .layer_weights import Heads, attention_branch, one_sample, tokens_of
from .mlp_lipschitz import Mlp, mlp_of
from .theorem_bound import layer_bound, unrolled, why_unrolled_is_vacuous

FLOOR = 1000  # times the rounding of the arithmetic: a relative residual below it says nothing of how it grew
OF_THEOREM = (
    "coefficient", "base", "spread", "residual_in", "residual_out", "bound_out", "log10_bound_unrolled", "vacuous", "reason",
)  # fmt: skip


@dataclass
class Found:
    """Rows of the table `corollary` (without `weights`), and notes on what is not there."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def corollary(
    structure: Structure,
    replay: Replay,
    edits: Edits,
    heads: Sequence[Heads],
    san: Sequence[float],
    why: str = "",
) -> Found:
    """Follow SAN+MLP through the blocks, on the sample of `replay`.

    edits: those of SAN+MLP; heads: of each attention layer, as `take_apart` reads them, none where the theorem does not cover
    them, for the reason `why`; san: the relative residual of pure attention at layers 0 to L or fewer
    """
    found = Found()
    x = replay.stream(structure.blocks[0])
    steps: list[tuple[Row, Row]] = []  # what is said of a layer, and what the theorem needs of it
    before = _relative(x, structure.blocks[0])
    for place, block in enumerate(structure.blocks):
        try:
            mlp, after = mlp_of(replay, block, edits, x)
        except RcProbeError as error:
            found.notes.append(f"No corollary 3.2: {error}")
            return found
        residual = _relative(after, block)
        if min(residual, before, _of(mlp)) < FLOOR * torch.finfo(x.dtype).eps:
            break
        said: Row = {
            "layer": place + 1, "lipschitz": mlp.constant, "gain": mlp.gain, "residual": residual, "rate": residual / before,
            "rate_san": san[place + 1] / san[place] if place + 1 < len(san) and san[place] else None,
        }  # fmt: skip
        steps.append(
            (said, _step(replay, block, edits, x, heads[place], mlp) if place < len(heads) else {"why": why})
        )
        x, before = after, residual
    found.rows = [
        said | of for (said, _), of in zip(steps, _of_theorem([step for _, step in steps]), strict=True)
    ]
    return found


def _step(replay: Replay, block: Block, edits: Edits, x: Tensor, heads: Heads, mlp: Mlp) -> Row:
    """What the bound needs of a layer; nothing where its MLP has no constant."""
    if mlp.constant is None:
        return {"why": mlp.why}
    tokens = one_sample(
        tokens_of(attention_branch(replay, block, edits), Split.of(x, token_axis(block) - block.ndim))
    )
    row, grown = layer_bound(tokens, heads), 2 * mlp.constant
    after = float(composite_norm(mlp.after - mlp.after.mean(0)))
    bound = row["bound_out"]
    return row | {
        "base": row["coefficient"] * grown, "residual_out": after, "trivial_out": row["trivial_out"] * grown,
        "bound_out": None if bound is None else bound * grown,
    }  # fmt: skip


def _of_theorem(steps: list[Row]) -> list[Row]:
    """The columns OF_THEOREM; from the first layer without a bound on they are empty."""
    known = next((i for i, step in enumerate(steps) if "why" in step), len(steps))
    rows = [step | {"coefficient": step["base"]} for step in steps[:known]]
    both = zip(rows, unrolled(rows), why_unrolled_is_vacuous(rows), strict=True)
    told = [
        {**steps[i], "log10_bound_unrolled": bound, "vacuous": bool(why), "reason": why}
        for i, (_, bound, why) in enumerate(both)
    ]
    empty: Row = dict.fromkeys(OF_THEOREM) | {"reason": steps[known]["why"] if known < len(steps) else ""}
    return [{name: row[name] for name in OF_THEOREM} for row in told] + [empty] * (len(steps) - known)


def _of(mlp: Mlp) -> float:
    """The relative residual of what enters the MLP."""
    size = float(composite_norm(mlp.before))
    return float(composite_norm(mlp.before - mlp.before.mean(0))) / size if size else math.nan


def _relative(x: Tensor, block: Any) -> float:
    tokens = x.detach().movedim(token_axis(block), -2).double()
    tokens = tokens.reshape(tokens.shape[-2:])
    size = float(composite_norm(tokens))
    return float(composite_norm(tokens - tokens.mean(0))) / size if size else 0.0
