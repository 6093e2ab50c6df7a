"""What a model is, found out by running it on two samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rc_probe.data.batches import Batch
from rc_probe.hooks.structure.example_inputs import with_no_cache


def logits_in(output: Any) -> Tensor | None:
    """The logits of an output; of a model pretrained on two tasks those of the tokens; None without any."""
    if not isinstance(output, Mapping):
        return None
    found = (output.get(name) for name in ("logits", "prediction_logits"))
    return next((value for value in found if isinstance(value, Tensor)), None)


def logits_of(model: Any, inputs: dict[str, Any]) -> Tensor | None:
    return logits_in(model(**with_no_cache(model, inputs)))


def influences(model: Any, batch: Batch) -> tuple[bool, bool]:
    """Whether the first half of a text changes the logits of the second, and the second those of the first.

    Asked by putting other tokens there, in the first text of the batch.
    """
    inputs = {key: value[:1] for key, value in batch.inputs.items()}
    ids = inputs["input_ids"]
    real = ids.shape[1] if batch.mask is None else int(batch.mask[0].sum())
    half, words = real // 2, model.get_input_embeddings().num_embeddings
    plain = logits_of(model, inputs)
    assert plain is not None
    found = []
    for asked, changed in ((slice(half, real), slice(0, half)), (slice(0, half), slice(half, real))):
        other = ids.clone()
        other[:, changed] = (ids[:, changed] + 1) % words
        logits = logits_of(model, inputs | {"input_ids": other})
        assert logits is not None
        difference = (logits - plain)[:, asked].abs().max()
        found.append(bool(difference > 8 * torch.finfo(plain.dtype).eps * plain[:, asked].abs().max()))
    return found[0], found[1]


def depends_on_padding(model: Any, batch: Batch) -> bool:
    """Whether a padded text alone, without the padding, gets other logits: a head that misjudges its last token."""
    if batch.mask is None:
        return False
    lengths = batch.mask.sum(1)
    row, width = int(lengths.argmin()), batch.mask.shape[1]
    alone = {
        key: value[row : row + 1, : int(lengths[row])]
        if value.shape[1:2] == (width,)
        else value[row : row + 1]
        for key, value in batch.inputs.items()
    }
    beside, by_itself = logits_of(model, batch.inputs), logits_of(model, alone)
    assert beside is not None and by_itself is not None
    difference = (beside[row] - by_itself[0]).abs().max()
    return bool(difference > torch.finfo(beside.dtype).eps ** 0.5 * beside[row].abs().max())


def trunk_of(model: Any, batch: Batch) -> Any:
    """The model, or its base model, whichever gives a last hidden state of the tokens; else None."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's wrapper
    for candidate in (model, getattr(core, "base_model", core)):
        try:
            output = candidate(**with_no_cache(candidate, batch.inputs))
        except Exception:  # whatever a base model says to the inputs of the whole
            continue
        states = output.get("last_hidden_state") if isinstance(output, Mapping) else None
        ids = batch.inputs.get("input_ids")
        if isinstance(states, Tensor) and (ids is None or states.shape[:2] == ids.shape):
            return candidate
    return None
