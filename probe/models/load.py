"""From a name to a model that can be measured: a Hub id, a folder, or `demo`.

The rule is that a model which loads here computes what its authors trained: every weight of the
trunk came from the checkpoint, is finite, and the tokenizer has its vocabulary. transformers only
warns in these cases, and what is measured afterwards would be a half random model.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from rc_probe.common_options import DTYPES
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.unwrap import unwrapped

from .adapter import add_adapter, base_of, brought
from .libraries import first_line, gguf_read_once, quiet
from .locate import SAVE, Source, load_config, locate
from .missing_weights import check_keys, check_size
from .own import class_of
from .stored_dtype import stored_dtype
from .towers import Part, pick
from .towers import modality as modality_of

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with what turns samples into its inputs.

    id: what the user typed; revision: the commit of a Hub model, else what was asked for
    modality: "text", "image" or "audio"; processor: the tokenizer, image processor or feature extractor
    notes: sentences for the report
    stack: of `model`, the one to measure (None: the last); others: names of those in parts left out
    random: the weights of its head that the checkpoint lacks
    """

    model: Any
    config: Any
    id: str
    revision: str | None
    modality: str
    processor: Any
    notes: list[str] = field(default_factory=list)
    stack: str | None = None
    others: tuple[str, ...] = ()
    random: tuple[str, ...] = ()


def load_model(
    model_id: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    device_map: Any = None,
    offload_folder: str | None = None,
    stack: str | None = None,
    blocks: str | None = None,
) -> Loaded:
    """Load `model_id`: a folder, a GGUF file, a Hub id, or a packaged model: "demo" (all-MiniLM-L6-v2), "demo-decoder"
    (SmolLM2-135M-Instruct).

    The folder of a PEFT adapter loads its base model, with the adapter on it.

    The class is the one that the config names (its head included), else AutoModel. `dtype` "auto" is the one that the
    weights are stored in, whatever the config says. `device` is CUDA where there is one, else the CPU.
    `device_map` spreads the model over several devices instead: one of accelerate's names, a dict {module: device}
    or a JSON file of one; what it puts on "disk" goes to `offload_folder`.
    Only safetensors are read unless `allow_pickle`; its own code runs only with `trust_remote_code`.

    Raises RcProbeError, one line, for whatever keeps the model from being what its checkpoint says.
    """
    wanted, target, places = check_dtype(dtype), check_device(device), check_device_map(device_map)
    adapter = locate(model_id, revision, trust_remote_code)
    source = base_of(adapter) or adapter
    with quiet(), gguf_read_once() if source.gguf else contextlib.nullcontext():
        config = load_config(source)
        _check_there(source, allow_pickle)
        wanted = stored_dtype(source) if wanted == "auto" else wanted
        spread = {"device_map": places, "offload_folder": offload_folder} if places is not None else {}
        model, notes, random = _load_weights(source, config, wanted, allow_pickle, spread)
        if source is not adapter:
            model = add_adapter(model, adapter, allow_pickle)
            own = tuple(f"{name}." for name in brought(model))
            random = tuple(name for name in random if not name.startswith(own))
        _check_finite(model, adapter)
        if places is None:
            with source.explain(f"the model does not fit on {target}", "Try --dtype bfloat16"):
                model.to(target)
        part = pick(model.eval(), stack, blocks)
        modality = _modality(part.model, source)
        processor = _load_processor(source, modality)
    commit = getattr(config, "_commit_hash", None) or revision
    return replace(_loaded(part, model_id, commit, modality, processor, notes), random=random)


def _loaded(
    part: Part, name: str, commit: str | None, modality: str, processor: Any, notes: list[str]
) -> Loaded:
    if part.name:
        notes = [*notes, f"Measured: its part {part.name}, by itself."]
    return Loaded(
        part.model, part.model.config, name, commit, modality, processor, notes, part.stack, part.others
    )


def check_dtype(dtype: str) -> Any:
    """The torch dtype of that name; "auto" stays."""
    if dtype not in DTYPES:
        todo = f"Choose one of {', '.join(DTYPES)}"
        raise RcProbeError(f"no such dtype {dtype!r}", where="--dtype", todo=todo)
    return dtype if dtype == "auto" else getattr(torch, dtype)


def check_device(device: str | None) -> torch.device:
    """The torch device of that name; None is CUDA, else the CPU. MPS has no float64 for our sums."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        todo = "Use cpu, cuda or cuda:1"
        raise RcProbeError(f"no such device {device!r}", where="--device", todo=todo) from None
    if target.type == "mps":
        what = "mps has no float64, and rc-probe sums its statistics in float64"
        raise RcProbeError(what, where="--device", todo="Use cpu, or leave --device out")
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}
    if (target.index or 0) >= there.get(target.type, 0):
        todo = "Use cpu, or leave --device out"
        raise RcProbeError(f"{device} is not available here", where="--device", todo=todo)
    return target


def check_device_map(device_map: Any) -> Any:
    """The device map as accelerate takes it: one of its names, or a dict {module: device}."""
    if device_map is None or isinstance(device_map, dict) or device_map in DEVICE_MAPS:
        return device_map
    path, todo = (
        Path(str(device_map)),
        f"Give one of {', '.join(DEVICE_MAPS)}, or a JSON file of {{module: device}}",
    )
    if path.suffix != ".json" or not path.is_file():
        raise RcProbeError(f"no such device map {str(device_map)!r}", where="--device-map", todo=todo)
    try:
        places = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RcProbeError(f"not JSON ({first_line(error)})", where=str(path), todo=todo) from error
    if not isinstance(places, dict) or not all(type(place) in (str, int) for place in places.values()):
        raise RcProbeError("not an object of {module: device}", where=str(path), todo=todo)
    return places


def _model_class(config: Any, source: Source) -> Any:
    """The class that `config.architectures` names, when it is one for this config; else AutoModel.

    GGUF files name none: language models are what they hold.
    """
    if source.gguf and type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if own := class_of(config.model_type):
        return own
    for name in config.architectures or []:
        cls: Any = getattr(transformers, name, None)
        known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        if known and cls.config_class is type(config):
            return cls
        for auto, code in (getattr(config, "auto_map", None) or {}).items():
            if source.options["trust_remote_code"] and isinstance(code, str) and code.split(".")[-1] == name:
                return getattr(transformers, auto)
    return transformers.AutoModel


def _check_there(source: Source, allow_pickle: bool) -> None:
    """RcProbeError for a folder without weights, or with a pickle that is not allowed."""
    if source.folder and not any(source.folder.glob("*.safetensors")):
        if not any(source.folder.glob("pytorch_model*.bin")):
            raise source.error("no weights in this folder (model.safetensors)", SAVE)
        if not allow_pickle:
            raise _pickle_only(source)


def _pickle_only(source: Source) -> RcProbeError:
    what = "the weights are only there as a pickle, which can run code"
    return source.error(what, "If you trust its author, allow it with --allow-pickle")


def _load_weights(
    source: Source, config: Any, dtype: Any, allow_pickle: bool, spread: dict[str, Any]
) -> tuple[Any, list[str], tuple[str, ...]]:
    """The model, notes about weights that its checkpoint lacks or that it does not use, and the ones it lacks."""
    cls = _model_class(config, source)
    check_size(cls, config, source)
    # The bar of de-quantisation is of a kind that no setting switches off.
    bars = contextlib.redirect_stderr(io.StringIO()) if source.gguf else contextlib.nullcontext()
    try:
        with bars:
            model, info = cls.from_pretrained(
                source.place,
                config=config,
                dtype=dtype,
                use_safetensors=None if allow_pickle or source.gguf else True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they come back in `info`, where the error can name them
                **spread,
                **source.options,
            )
    except Exception as error:
        name, text = type(error).__name__, first_line(error)
        if name == "SafetensorError":
            todo = "Download or save the model again"
            raise source.error(f"the weights are corrupt or incomplete ({text})", todo) from error
        if name == "UnpicklingError":  # its own text advises to run the file's code
            what = "the pickle is corrupt, or holds more than tensors"
            raise source.error(what, "Ask for the model as safetensors") from error
        if isinstance(error, OSError) and "with `safetensors`" in str(error):
            raise _pickle_only(source) from error
        todo = "Check the checkpoint and config.json" + (
            ", --device-map and --offload-folder" if spread else ""
        )
        raise source.error(f"the model does not load ({text})", todo) from error
    notes = (
        ["The weights of the GGUF file were de-quantised; the model computes with these."]
        if source.gguf
        else []
    )
    return model, notes + check_keys(model, info, source), tuple(sorted(info["missing_keys"]))


def _check_finite(model: nn.Module, source: Source) -> None:
    real = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    for name, weight in model.named_parameters():
        plain = type(weight.detach()) is torch.Tensor and weight.dtype in real
        if not plain or weight.is_meta or not weight.numel():  # quantised, offloaded, empty
            continue
        if not all(end.isfinite() for end in torch.aminmax(weight.detach())):  # NaN passes through to both
            raise source.error(f"NaN or infinite weights in {name}", "Save or download the model again")


def _modality(model: Any, source: Source) -> str:
    found = modality_of(model)
    if found is None:
        what = f"{type(model).__name__} takes {model.main_input_name}, neither text nor images nor sounds"
        raise source.error(what, "Choose a text, vision or audio model")
    return found


def _load_processor(source: Source, modality: str) -> Any:
    if modality == "image":
        with source.explain("no image processor", "Add the original model's preprocessor_config.json"):
            # The PIL backend, so that numbers do not depend on whether torchvision is installed.
            return transformers.AutoImageProcessor.from_pretrained(
                source.place, backend="pil", **source.options
            )
    if modality == "audio":
        with source.explain("no feature extractor", "Add the original model's preprocessor_config.json"):
            return transformers.AutoFeatureExtractor.from_pretrained(source.place, **source.options)
    todo = "Add the original model's tokenizer files (tokenizer.save_pretrained)"
    with source.explain("no tokenizer", todo):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.place, **source.options)
    # Without its files transformers hands out a tokenizer that knows its special tokens and no word.
    if len(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)) < 2:
        raise source.error("no tokenizer: its files are missing and its vocabulary is empty", todo)
    return tokenizer


def hold_model(
    model: Any, processor: Any = None, *, stack: str | None = None, blocks: str | None = None
) -> Loaded:
    """A transformers model that the user holds, as Loaded; the model itself is not changed.

    Without `processor`, the tokenizer, image processor or feature extractor is looked for where the model came from.
    Raises RcProbeError for what is not a transformers model, NaN weights, and a missing processor.
    """
    core: Any = unwrapped(model)
    if processor is None and core is not model:  # sentence-transformers' models bring theirs
        processor = getattr(model, "tokenizer", None)
    name = type(core).__name__
    if not hasattr(core, "config") or not hasattr(core, "main_input_name"):
        todo = "Give a Hub id, a folder, or a transformers model; rc_probe.attach takes other modules"
        raise RcProbeError("not a transformers model", where=name, todo=todo)
    place = getattr(core, "name_or_path", "") or core.config._name_or_path
    source = Source(place or name, place, {"local_files_only": True})
    _check_finite(core, source)
    part = pick(core, stack, blocks)
    modality = _modality(part.model, source)
    if processor is None:
        if not place:
            kind = {"image": "image processor", "audio": "feature extractor"}.get(modality, "tokenizer")
            raise source.error(
                f"it was not loaded from anywhere, so its {kind} is unknown", "Give processor="
            )
        with quiet():
            processor = _load_processor(source, modality)
    return _loaded(part, place or name, None, modality, processor, [])
