"""What the processes of one run must agree on, and where each puts the model."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch

import rc_probe
from rc_probe.common_options import ModelAndData
from rc_probe.data.batches import Batches
from rc_probe.data.samples import Samples
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import Structure
from rc_probe.models.structure_table import structure_rows

from .world import World


def own_device(chosen: ModelAndData, world: World) -> str | None:
    """Where this process loads the model: of several processes each has a GPU of its own."""
    if world.size == 1:
        return chosen.device
    if chosen.device_map is not None:
        what = f"each of the {world.size} processes would spread a whole model over all devices"
        raise RcProbeError(what, where="--device-map", todo="Start one process, or leave --device-map out")
    if chosen.device not in (None, "cpu", "cuda"):
        what = f"{world.size} processes cannot share {chosen.device}"
        raise RcProbeError(what, where="--device", todo="Leave it out: each process takes a GPU of its own")
    return chosen.device if world.device is None else str(world.device)


def facts(chosen: ModelAndData, samples: Samples, made: Batches, structure: Structure) -> dict[str, Any]:
    """What must be the same in all processes of a run, by what it is called."""
    import transformers

    def mark(items: Any) -> str:
        return hashlib.sha256(repr(items).encode()).hexdigest()

    return {
        "versions": [rc_probe.__version__, torch.__version__, transformers.__version__],
        "options": mark(replace(chosen, data=None, device=None)),
        "samples": [samples.kind, len(samples.items), mark([_named(x) for x in samples.items])],
        "batches": [[len(batch) for batch in made.slices], made.tokens],
        "blocks": mark([structure_rows(structure), structure.name, structure.proved]),
    }


def _named(sample: Any) -> str:
    """A text, or the name of a file; machines may keep it in different folders."""
    return sample if isinstance(sample, str) else str(getattr(sample, "name", ""))
