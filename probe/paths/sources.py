"""Where paths begin: inputs of which the tokens are one part of the stream, apart from what joins them before block 1."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.frozen.parts import Ledger, Parts
from rc_probe.hooks.structure.structure import Structure
from rc_probe.hooks.undo import entered


def in_parts(
    structure: Structure, batch: dict[str, Any], ledger: Ledger
) -> tuple[dict[str, Any], AbstractContextManager[Any]]:
    """The inputs with the user's data in parts; ids become parts where they are embedded."""
    main = getattr(structure.model, "main_input_name", "input_ids")
    if decodes(structure, batch):
        main = "decoder_input_ids"
    data = batch.get(main)
    if not isinstance(data, Tensor):
        raise RcProbeError(
            f"the batch has no {main}", where=type(structure.model).__name__, todo="Leave by_source out"
        )
    if data.is_floating_point():
        return {**batch, main: Parts(data, _first_of_three(data), ledger)}, entered(_Embeddings(None, ledger))
    return batch, entered(_Embeddings(data, ledger))


def decodes(structure: Structure, batch: dict[str, Any]) -> bool:
    """Whether the stack reads the decoder's text. A decoder may have an `encoder` of its own within."""
    sides = [word for word in structure.name.split(".") if word in {"encoder", "decoder"}]
    return "decoder_input_ids" in batch and sides[:1] != ["encoder"]


def _first_of_three(x: Tensor) -> Tensor:
    return torch.stack([x, torch.zeros_like(x), torch.zeros_like(x)])


class _Embeddings(TorchFunctionMode):
    """What embeds `ids` gives the source of the tokens."""

    def __init__(self, ids: Tensor | None, ledger: Ledger) -> None:
        super().__init__()
        self.ids, self.ledger = ids, ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.ids is None or getattr(func, "__name__", "") != "embedding":
            return out
        index = args[0] if args else (kwargs or {})["input"]
        if index.numel() == self.ids.numel() and bool((index.reshape(-1) == self.ids.reshape(-1)).all()):
            return Parts(out, _first_of_three(out), self.ledger)
        return out
