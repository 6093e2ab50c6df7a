"""Whether a checkpoint and a model have the same weights: what the stream depends on came from the file, and all blocks are used."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch
from torch import nn
from torch.utils._device import DeviceContext

from rc_probe.hooks.undo import entered

from .locate import Source

MANY, PACKED = 10**8, 16  # weights that no one minds; of larger models, at most so many in a byte
# What no stream depends on inside a base model: heads behind it, and wav2vec 2.0's mask for training. Within a
# numbered block the same names mean parts of the trunk, such as a router's classifier.
HEADS = {"pooler", "lm_head", "classifier", "score", "masked_spec_embed"}


def check_keys(model: Any, info: dict[str, Any], source: Source) -> list[str]:
    """Notes on missing weights of a head and on unused ones.

    info: what `from_pretrained(output_loading_info=True)` gives
    Raises RcProbeError for weights of the trunk that are missing, and for blocks in the file that the model lacks.
    """
    for name, found, wanted in sorted(info["mismatched_keys"]):
        what = f"{name} has shape {tuple(found)} in the checkpoint and {tuple(wanted)} by config.json"
        raise source.error(what, "Use the config.json that belongs to these weights")
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    trunk = [key for key in missing if key.startswith(prefix) and not _of_head(key)]
    name = type(model).__name__
    if trunk:
        what = f"{len(trunk)} weights are not in the checkpoint and would be random: {_some(trunk)}"
        raise source.error(what, f"Use a checkpoint saved from {name}")
    blocks = _blocks_left_out(model, prefix, unused)
    if blocks:
        what = f"blocks of the checkpoint are not used by {name} as config.json has it: {_some(blocks)}"
        raise source.error(what, "Use the config.json that belongs to these weights")
    notes = []
    if missing:
        notes.append(f"Not in the checkpoint, so random, but no stream depends on it: {_some(missing)}.")
    if unused:
        notes.append(f"In the checkpoint, but not used by {name}: {_some(unused)}.")
    return notes


def check_size(cls: Any, config: Any, source: Source) -> None:
    """RcProbeError where a config asks for far more weights than the folder holds, before any memory is asked for."""
    if source.folder is None:
        return
    stored = sum(
        file.stat().st_size for file in source.folder.iterdir() if file.suffix in (".safetensors", ".bin")
    )
    try:
        with torch.random.fork_rng(devices=[]), entered(DeviceContext(torch.device("meta"))):
            model = cls.from_config(config) if cls.__name__.startswith("Auto") else cls(config)
        asked = sum(weight.numel() for weight in model.parameters())
    except Exception:  # loading will say what is wrong with it
        return
    if asked > max(MANY, PACKED * stored):
        what = f"config.json asks for {asked:,} weights, and the files hold {stored:,} bytes"
        raise source.error(what, "Use the config.json that belongs to these weights")


def _of_head(key: str) -> bool:
    outside = takewhile(lambda part: not str.isdigit(part), key.split("."))
    return not HEADS.isdisjoint(outside)


def _blocks_left_out(model: nn.Module, prefix: str, unused: list[str]) -> list[str]:
    """Of the unused weights, the numbered modules whose list is in the model: `encoder.layer.7`."""
    lists = {
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    lists |= {name.removeprefix(prefix) for name in lists}
    found: dict[str, None] = {}
    for key in unused:
        parts = key.split(".")
        for place, part in enumerate(parts):
            if part.isdigit() and ".".join(parts[:place]) in lists and not _of_head(key):
                found[".".join(parts[: place + 1])] = None
    return list(found)


def _some(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
