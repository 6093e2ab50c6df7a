"""Models of several modalities: which part of them is measured.

A text goes through the whole model where it can (LLaVA's language model). A tower that takes another
modality, or one of two that must run together (CLIP), is measured as the model that it is by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from rc_probe.hooks.attach import find_structure, named
from rc_probe.hooks.errors import RcProbeError

MODALITIES = {
    "input_ids": "text",
    "pixel_values": "image",
    "input_features": "audio",
    "input_values": "audio",
}


@dataclass(frozen=True)
class Part:
    """What is measured of a model: `model` is the whole, or the tower `name` of it.

    stack: the name of the chosen stack within `model`; None, its last one
    others: names of the stacks, in the whole model, that were not chosen
    """

    model: Any
    name: str = ""
    stack: str | None = None
    others: tuple[str, ...] = ()


def modality(model: nn.Module) -> str | None:
    """text, image or audio: what the model's main input is; None for anything else."""
    return MODALITIES.get(getattr(model, "main_input_name", ""))


def pick(model: Any, stack: str | None, blocks: str | None = None) -> Part:
    """The part of `model` that holds the stack of that name; without a name, the one that can run.

    With `blocks`, which names blocks of the whole model, it is the whole model.
    Attaches to each candidate on random inputs, but only where a model takes several modalities.

    Raises RcProbeError when no part can be attached, or no stack, or more than one, has the name.
    """
    parts = _parts(model)
    if (
        blocks
        or not parts
        or ("" in parts and {modality(part) for part in parts.values()} == {modality(model)})
    ):
        return Part(model, stack=stack)
    found: dict[str, tuple[str, str]] = {}  # full name of a stack -> (the part, the stack in it)
    failed: list[str] = []
    for name, part in parts.items():
        if any(full.startswith(name + ".") for full in found):
            continue  # its stacks are there already
        try:
            first = find_structure(part, several=True)
        except RcProbeError as error:
            failed.append(str(error))
            continue
        for inner in (first.name, *first.others):
            found.setdefault(".".join(filter(None, (name, inner))), (name, inner))
    if not found:
        raise RcProbeError(failed[0] if failed else "nothing in it can be run", where=type(model).__name__)
    full = next(iter(found)) if stack is None else named(list(found), stack, type(model).__name__)
    name, inner = found[full]
    return Part(parts[name], name, inner, tuple(other for other in found if other != full))


def _parts(model: Any) -> dict[str, Any]:
    """The whole model, then the models inside it that take a known input, those with its own modality first.

    An encoder-decoder that does not begin with text has no text for its decoder: only its encoder is left.
    """
    own = modality(model)
    whole = own == "text" or not getattr(model.config, "is_encoder_decoder", False)
    within = model if whole else model.get_encoder()
    inside = set(within.modules())
    inner = {
        name: part
        for name, part in model.named_modules()
        if name and part in inside and hasattr(part, "config") and modality(part)
    }
    ordered = dict(sorted(inner.items(), key=lambda item: modality(item[1]) != own))
    return ({"": model} if whole and own else {}) | ordered
