"""What the libraries underneath print and raise, made quiet and short."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import huggingface_hub
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from rc_probe.hooks.undo import undoing


def hub_problem() -> str | None:
    """Why the Hub cannot be asked, or None. Found out quickly: the library itself retries for 23 seconds."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the HTTP library of the day raises: no name, no route, proxy, time-out
        return "the Hugging Face Hub cannot be reached"
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """No reports, bars or warnings of libraries inside (download bars stay); then as before."""
    disabled = logging.root.manager.disable
    log, hub_off = transformers.utils.logging, are_progress_bars_disabled()
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()

    def back() -> None:
        logging.disable(disabled)
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
        if hub_off:
            disable_progress_bars()

    with undoing(back), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(max(disabled, logging.WARNING))  # some libraries log as they are imported
        log.set_verbosity_error()
        log.disable_progress_bar()
        if not hub_off:
            enable_progress_bars()
        yield


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Inside, a GGUF file is parsed once, and the names of its tensors are made once; transformers does both for each part of a model."""
    import gguf

    real = gguf.GGUFReader, gguf.get_tensor_name_map

    def back() -> None:
        gguf.GGUFReader, gguf.get_tensor_name_map = real

    with undoing(back):
        gguf.GGUFReader, gguf.get_tensor_name_map = map(cache, real)
        yield


def first_line(error: BaseException) -> str:
    """The first sentence of an error, to quote in ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].strip().rstrip(".:")[:300]
