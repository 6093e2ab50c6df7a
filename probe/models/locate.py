"""Where a model comes from: a Hub id, a folder, a GGUF file or a packaged model, found before anything is loaded; its config."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    validate_repo_id,
)

from rc_probe.hooks.errors import RcProbeError

from .libraries import first_line, hub_problem
from .own import class_of
from .packaged import DEMOS, check_revision, is_here

MOST = 99_999  # layers, experts or sizes of a block that a config may ask for
SAVE = "Give a folder written by save_pretrained"


@dataclass(frozen=True)
class Source:
    """Where a model is: its name as typed, the folder or Hub id, and the options of every from_pretrained.

    offline: why only the Hub's cache was looked at
    """

    id: str
    place: str
    options: dict[str, Any]
    offline: str | None = None

    @property
    def folder(self) -> Path | None:
        return Path(self.place) if Path(self.place).is_dir() and not self.gguf else None

    @property
    def gguf(self) -> bool:
        """Whether it is one GGUF file, from which config and tokenizer come, too."""
        return "gguf_file" in self.options

    def error(self, what: str, todo: str) -> RcProbeError:
        return RcProbeError(what, where=self.id, todo=todo)

    @contextmanager
    def explain(self, what: str, todo: str) -> Iterator[None]:
        """Any error inside as one line; for calls into libraries, never around our own logic."""
        try:
            yield
        except Exception as error:
            raise self.error(f"{what} ({first_line(error)})", todo) from error


def locate(model_id: str, revision: str | None, trust_remote_code: bool) -> Source:
    check_revision(model_id, revision)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if model_id in DEMOS:
        inside = DEMOS[model_id].find(model_id)
        return (
            _gguf(model_id, inside, options)
            if inside.suffix == ".gguf"
            else Source(model_id, str(inside), options)
        )
    if not is_here(model_id):
        return _of_hub(model_id, revision, options)
    path = Path(model_id).expanduser()
    if path.is_dir():
        return Source(model_id, str(path), options)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _gguf(model_id, path, options)
    source = Source(model_id, model_id, options)
    raise source.error("a file, not a model", "Give the folder that holds config.json, or a .gguf file")


def _of_hub(model_id: str, revision: str | None, options: dict[str, Any]) -> Source:
    source = Source(model_id, model_id, options)
    try:
        validate_repo_id(model_id)
    except ValueError:
        todo = "Check the path, give a Hub id (owner/name), or try `demo`"
        raise source.error("no such folder, and not a Hub id", todo) from None
    offline = hub_problem()
    options |= {"revision": revision, "local_files_only": offline is not None}
    return Source(model_id, model_id, options, offline)


def _gguf(model_id: str, file: Path, options: dict[str, Any]) -> Source:
    if importlib.util.find_spec("gguf") is None:
        todo = 'Install it: pip install "rc-probe[gguf]"'
        raise RcProbeError("a GGUF file is read with the package gguf", where=model_id, todo=todo)
    return Source(model_id, str(file.parent), options | {"gguf_file": file.name})


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [None]


def load_config(source: Source) -> Any:
    if source.folder and not (source.folder / "config.json").is_file():
        raise source.error("no config.json in this folder", SAVE)
    try:
        raw, _ = transformers.PretrainedConfig.get_config_dict(source.place, **source.options)
    except Exception as error:
        if source.folder:
            raise source.error("config.json cannot be read", SAVE) from error
        if source.gguf:
            todo = "Check the file, or give the original checkpoint"
            raise source.error(f"the GGUF file cannot be read ({first_line(error)})", todo) from error
        what, todo = first_line(error), "Check the name and --revision, give a local folder or `demo`, or "
        if source.offline:
            what = f"no such folder, no cached copy, and {source.offline}"
        raise source.error(what, todo + "set HF_TOKEN for a gated or private model") from error
    classes = raw.get("architectures") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not all(isinstance(name, str) for name in _list(classes)):
        raise source.error("config.json is not as save_pretrained writes it", SAVE)
    kind = raw.get("model_type")
    if not isinstance(kind, str | None):
        raise source.error("the model_type of config.json is no text", SAVE)
    class_of(kind)  # one of ours is known from now on
    if not source.options["trust_remote_code"] and kind not in transformers.CONFIG_MAPPING:
        if raw.get("auto_map"):
            todo = "Read that code, then allow it with --trust-remote-code"
            raise source.error("the model runs code of its own", todo)
        if kind is None:
            raise source.error("config.json names no model_type", SAVE)
        what = f"transformers {transformers.__version__} knows no model type {kind!r:.80}"
        raise source.error(what, "Update transformers, or check config.json")
    with source.explain("the config does not load", "Check config.json"):
        config = (
            transformers.AutoConfig.for_model(**raw)  # as it was just read
            if source.gguf
            else transformers.AutoConfig.from_pretrained(source.place, **source.options)
        )
    _check_sizes(config.to_dict(), source)
    return config


def _check_sizes(config: dict[str, Any], source: Source) -> None:
    """Refuse what would be built for hours."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value, source)
        elif isinstance(value, int) and value > MOST and re.search("layer|expert|block|depth", key):
            raise source.error(f"{key} is {value:,} in its config", "Check config.json")
