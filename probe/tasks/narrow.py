"""Whether a task's scores can be read from its positions alone: a vocabulary is the largest map of many models."""

from __future__ import annotations

from dataclasses import replace

import torch

from rc_probe.hooks.edits.model_head import NarrowHead
from rc_probe.hooks.edits.model_state import full_precision, measuring
from rc_probe.hooks.module_calls import hooked
from rc_probe.hooks.structure.example_inputs import small, with_no_cache

from .base import Prepared, Task
from .prediction import MaskedToken, NextToken

NOISE = 16  # eps of the largest score: a product of fewer rows may be summed in another order


def narrow_head(task: Task | None, prepared: Prepared | None) -> NarrowHead | None:
    """Tried on two short samples: what lies behind the head takes what it gives. None where it does not, or nothing is won."""
    if prepared is None or not isinstance(task, NextToken | MaskedToken):
        return None
    head = task.model.get_output_embeddings()
    if head is None or hooked(head):  # somebody listens to the whole of it
        return None
    narrow, inputs = NarrowHead(head), with_no_cache(task.model, small(prepared.inputs))
    with measuring(task.model), full_precision(task.model):
        whole = task.head(task.model(**inputs))
        row, column = (place.flatten()[::3] for place in torch.ones(whole.shape[:2]).nonzero(as_tuple=True))
        with narrow.installed():
            narrow.at = row, column
            try:
                part = task.head(task.model(**inputs))
            except Exception:  # what lies behind it wants another shape
                return None
    wanted = whole[row.to(whole.device), column.to(whole.device)]
    if part.shape != (1, *wanted.shape):
        return None
    difference = (part[0].double() - wanted.double()).abs().max()
    close = bool(difference <= NOISE * torch.finfo(whole.dtype).eps * wanted.double().abs().max())
    return narrow if close else None


def words_of(task: Task | None) -> int:
    """Among how many words a task's head chooses; 0 where it is no head of words."""
    head = task.model.get_output_embeddings() if isinstance(task, NextToken | MaskedToken) else None
    weight = getattr(head, "weight", None)
    return len(weight) if isinstance(weight, torch.Tensor) else 0


def narrowed(prepared: Prepared) -> Prepared:
    """Where the scores are in what a narrow head gives."""
    count = len(prepared.row)
    return replace(prepared, row=torch.zeros(count, dtype=torch.long), column=torch.arange(count))
