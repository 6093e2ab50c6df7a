"""The library's model types: the class to build for each, and its category."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import transformers
from census.exceptions import EXCEPTIONS
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

# The first row with a word of one of the type's tasks gives the category.
CATEGORIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("multimodal", ("IMAGE_TEXT", "MULTIMODAL", "VISUAL", "ZERO_SHOT", "DOCUMENT")),
    ("audio", ("AUDIO", "SPEECH", "CTC", "WAVEFORM", "RNNT", "TDT", "SPECTROGRAM")),
    ("text encoder-decoder", ("SEQ_TO_SEQ_CAUSAL_LM",)),
    ("text encoder", ("MASKED_LM",)),
    ("text decoder", ("CAUSAL_LM",)),
    ("vision", ("IMAGE", "OBJECT", "SEGMENT", "VIDEO", "DEPTH", "KEYPOINT", "BACKBONE", "POSE")),
)
DATA = {"text": "text", "vision": "vision", "image": "vision", "audio": "audio", "speech": "audio"}


class NotBuilt(Exception):  # noqa: N818 (a finding of the census, not a fault)
    """This type cannot be built or run here; the message is the reason, in one line."""


def model_types() -> list[str]:
    """Every model type of the library, sorted; types of the parts of larger models among them."""
    return sorted(CONFIG_MAPPING)


def model_class(model_type: str) -> Any:
    """The base model of the type, else the first head registered for it, else the first class of its module.

    Raises NotBuilt where no class takes the type's config.
    """
    if (row := EXCEPTIONS.get(model_type)) and row.cls:
        return getattr(transformers, row.cls)
    registered = [modeling_auto.MODEL_MAPPING_NAMES.get(model_type)]
    registered += [mapping[model_type] for _, mapping in _heads() if model_type in mapping]
    for entry in registered:
        name = entry if isinstance(entry, str) or not entry else entry[0]
        if name and hasattr(transformers, name):
            return getattr(transformers, name)
    config_class = CONFIG_MAPPING[model_type]
    path = config_class.__module__.replace("configuration_", "modeling_")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError:
        raise NotBuilt("no model class takes this config") from None
    for cls in _models(module):
        if cls.config_class is config_class:
            return cls
    raise NotBuilt("no model class takes this config")


def _models(module: Any) -> Iterator[Any]:
    """Models with a forward pass, in order of the file."""
    for cls in vars(module).values():
        if inspect.isclass(cls) and issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__:
            model: Any = cls
            if model.forward is not nn.Module.forward:
                yield model


def _heads() -> Iterator[tuple[str, dict[str, Any]]]:
    """The library's tables of heads: (task, {type: class name})."""
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_FOR_") and name.endswith("_MAPPING_NAMES"):
            yield name.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES"), mapping


def category(model_type: str) -> str:
    """What the type works on, from the tasks that the library registers it for; without any, from its inputs.

    One of "text encoder", "text decoder", "text encoder-decoder", "vision", "audio", "multimodal",
    "text other", "vision other", "other".
    """
    tasks = {task for task, mapping in _heads() if model_type in mapping}
    if len(_data(CONFIG_MAPPING[model_type])) > 1:
        return "multimodal"
    for name, words in CATEGORIES:
        if any(word in task for word in words for task in tasks):
            return name
    return _by_input(model_type)


def _data(config_class: type[PreTrainedConfig]) -> set[str]:
    """The kinds of data that the sub-configs are named after."""
    return {kind for word, kind in DATA.items() for name in config_class.sub_configs if word in name}


def _by_input(model_type: str) -> str:
    try:
        names = set(inspect.signature(model_class(model_type).forward).parameters)
    except (NotBuilt, ImportError):
        return "other"
    sounds, images = names & {"input_features", "input_values"}, any("pixel_values" in name for name in names)
    if "input_ids" in names:
        return "multimodal" if sounds or images else "text other"
    return "audio" if sounds else "vision other" if images else "other"
