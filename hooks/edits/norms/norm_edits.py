"""What may stand in place of a norm: nothing, its scale of the plain pass, or a part of what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from rc_probe.hooks.edits.block_mode import ModuleEdit
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.structure.structure import Block, NormCall, Structure
from rc_probe.hooks.undo import unseen

from .norm_form import NormForm, norm_form

FROZEN = "frozen"
Made = TypeVar("Made", Tensor, None)


def norm_edits(structure: Structure, numbers: tuple[int, ...] | None, how: str) -> Edits:
    """The edits of all norms of these blocks, from 1. how: FROZEN, or one of `OTHERS`.

    Raises RcProbeError, with the norm's name, where it is no module, or its form has to be known and is not.
    """
    edits, readings = Edits(), Edits()
    for block, norm in structure.norm_calls(numbers):
        key = (block.index, norm.name, norm.turn)
        if how == FROZEN:
            held = Held(structure, block, norm)
            readings.watch_norm(key, _unseen(held.read))
            edits.norms[key] = _unseen(held.edit)
        else:
            edits.norms[key] = _unseen(OTHERS[how](structure, block, norm))
    edits.readings = readings if readings.blocks else None
    return edits


def _unseen(function: Callable[[Tensor, Tensor], Made]) -> Callable[[Tensor, Tensor], Made]:
    """Its sums are none of the model's adds."""

    def run(x: Tensor, y: Tensor) -> Made:
        with unseen():
            return function(x, y)

    return run


class Held:
    """A norm with its scale of the plain pass: linear in what it reads."""

    def __init__(self, structure: Structure, block: Block, norm: NormCall) -> None:
        self.structure, self.block, self.norm = structure, block, norm
        self.form = norm_form(structure, block, norm)
        self.scale: Tensor | None = None  # of each token of the plain pass, with an axis of one at the end

    def read(self, x: Tensor, y: Tensor) -> None:
        self.scale = self.form.scale(x.detach())

    def edit(self, x: Tensor, y: Tensor) -> Tensor:
        if self.scale is None or self.scale.shape[:-1] != x.shape[:-1]:
            raise self.structure.error(
                self.block,
                f"the scale of its {self.norm.name} was not read in a plain pass on these very inputs",
                "Run the whole model on them, or choose another norm than frozen",
            )
        bias = self.form.bias.to(y.device, x.dtype)
        return (y.to(x.dtype) - bias) * (self.form.scale(x) / self.scale) + bias


def _identity(structure: Structure, block: Block, norm: NormCall) -> ModuleEdit:
    return lambda x, y: x.clone()


def _center(structure: Structure, block: Block, norm: NormCall) -> ModuleEdit:
    return lambda x, y: x - x.mean(-1, keepdim=True)


def _scale(structure: Structure, block: Block, norm: NormCall) -> ModuleEdit:
    """Each token is divided by the root of its mean square: all come to lie on one sphere."""
    on_sphere = NormForm(False, norm_form(structure, block, norm).epsilon, torch.zeros(()))
    return lambda x, y: x / on_sphere.scale(x)


def _no_affine(structure: Structure, block: Block, norm: NormCall) -> ModuleEdit:
    form = norm_form(structure, block, norm)
    return lambda x, y: form.centre(x) / form.scale(x)


OTHERS: dict[str, Callable[[Structure, Block, NormCall], ModuleEdit]] = {
    "identity": _identity,
    "no-affine": _no_affine,
    "center": _center,
    "scale": _scale,
}
