"""PEFT adapters: a folder that holds what was trained, and the name of the model it was trained on."""

from __future__ import annotations

import importlib.util
import json
import warnings
from dataclasses import replace
from typing import Any

from rc_probe.hooks.errors import RcProbeError

from .locate import Source, locate

MERGE = "merge adapter and base model, and save the merged model"


def base_of(adapter: Source) -> Source | None:
    """Where the base model of an adapter's folder is; None when it is not the folder of an adapter.

    Raises RcProbeError when the base model is not there, or peft is not.
    """
    folder = adapter.folder
    if folder is None or (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file():
        return None
    with adapter.explain("adapter_config.json cannot be read", "Save the adapter again"):
        config = json.loads((folder / "adapter_config.json").read_text())
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base:
        raise adapter.error("an adapter without its base model", MERGE.capitalize())
    if importlib.util.find_spec("peft") is None:
        raise adapter.error(
            f"an adapter of {base}, and peft is not installed", f"pip install peft, or {MERGE}"
        )
    try:
        found = locate(base, revision, adapter.options["trust_remote_code"])
    except RcProbeError as error:
        raise adapter.error(f"an adapter of {base}: {error.what}", MERGE.capitalize()) from error
    return replace(found, id=f"{adapter.id}, an adapter of {base}")


def add_adapter(model: Any, adapter: Source, allow_pickle: bool) -> Any:
    """The base model with the adapter on it. Raises RcProbeError when weights are missing or do not fit."""
    import peft

    assert adapter.folder is not None
    if not (adapter.folder / "adapter_model.safetensors").is_file() and not allow_pickle:
        raise adapter.error(
            "no adapter_model.safetensors in this folder",
            "Save the adapter again; a pickle (adapter_model.bin) can run code, and --allow-pickle allows it",
        )
    with (
        warnings.catch_warnings(record=True) as said,
        adapter.explain("the adapter does not load", "Save it again"),
    ):
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(model, str(adapter.folder))
    if any("missing adapter keys" in str(warning.message) for warning in said):
        raise adapter.error("weights of the adapter are not in its file and would be random", "Save it again")
    return model


def brought(model: Any) -> set[str]:
    """Names, in the base model, of the modules that the adapter replaces by its own, such as a classifier."""
    whole = (
        name.split(".modules_to_save")[0]
        for name, _ in model.named_parameters()
        if ".modules_to_save." in name
    )
    return {name.removeprefix("base_model.model.") for name in whole}
