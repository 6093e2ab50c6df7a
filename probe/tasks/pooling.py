"""How a model's last hidden state becomes one vector: as its authors do where they say so, else the mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from rc_probe.models.libraries import hub_problem, quiet
from rc_probe.models.load import Loaded

CONFIG = "1_Pooling/config.json"  # sentence-transformers
MODES = {  # its keys, in the order in which it joins them
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean",  # but for its length, which the cosine does not see
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def pooling_of(loaded: Loaded) -> tuple[tuple[str, ...], str]:
    """(names of the poolings whose results are joined, a note for the reader)."""
    config = _config(loaded)
    said = tuple(mode for key, mode in MODES.items() if config.get(key) is True)
    single = config.get("pooling_mode")  # newer files
    if not said and isinstance(single, str) and single in {"cls", "max", "mean", "weightedmean", "lasttoken"}:
        said = (single,)
    pooling = said or ("mean",)
    named = " and ".join(
        {"cls": "first token", "lasttoken": "last token"}.get(mode, mode) for mode in pooling
    )
    source = f" as its {CONFIG} says" if said else ""
    return pooling, f"Embeddings are pooled from the last hidden state ({named}{source})."


def _config(loaded: Loaded) -> dict[str, Any]:
    """The model's file, {} without one."""
    place = getattr(loaded.model, "name_or_path", "") or loaded.config._name_or_path
    if loaded.modality != "text" or not place:
        return {}
    path: Any = Path(place) / CONFIG
    try:
        if not Path(place).is_dir():  # of the Hub
            with quiet():
                path = cached_file(
                    place, CONFIG, revision=loaded.revision, local_files_only=hub_problem() is not None,
                    _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
                    _raise_exceptions_for_gated_repo=False,
                )  # fmt: skip
        found = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
