"""The streams of a model, as a plain forward hook sees them, and comparing them."""

from collections.abc import Sequence
from typing import Any

import torch
from support import zoo
from support.odd_models import REFUSED
from torch import Tensor

from rc_probe import Gate
from rc_probe.hooks.edits.gates import gate_edits
from rc_probe.hooks.structure.structure import Structure
from rc_probe.interventions.intervention import Variant
from rc_probe.measures.variant_passes import stream_pass

PROVED = [name for name in zoo.TRANSFORMERS if name not in REFUSED]


def streams(
    structure: Structure, inputs: dict[str, Any], gates: Sequence[Gate] | Variant = ()
) -> list[Tensor]:
    edits = gates.edits(structure) if isinstance(gates, Variant) else gate_edits(structure, gates)
    found: list[Tensor] = []
    with torch.no_grad():
        stream_pass(structure, inputs, edits, lambda layer, x: found.append(x.clone()))
    return found


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for layer, (x, y) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(x, y), f"layer {layer}: {(x - y).abs().max()}"
