"""`rc_probe.probe`: the whole measurement of one model, from a name and data to a ProbeResult."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch

import rc_probe
from rc_probe.common_options import CommonOptions, ModelAndData
from rc_probe.data.batches import Batches, batches, long_enough
from rc_probe.data.digest import digest_of
from rc_probe.data.places import check_place
from rc_probe.data.samples import Samples, load_samples
from rc_probe.hooks.errors import RcProbeError
from rc_probe.measures import MEASUREMENTS
from rc_probe.measures.coarse_rounding import name_of_rounding
from rc_probe.models.load import Loaded, hold_model, load_model
from rc_probe.models.packaged import SAMPLES, is_here, with_defaults
from rc_probe.options import flag, in_python
from rc_probe.processes.agreement import facts, own_device
from rc_probe.processes.world import World

from .result import ProbeResult
from .run import Progress, Run
from .settings import Settings

OF_TEXTS = ("length", "special_tokens")
OF_LOADING = (
    "revision",
    "dtype",
    "device",
    "device_map",
    "offload_folder",
    "allow_pickle",
    "trust_remote_code",
)


def probe(
    model: Any,
    data: Any = None,
    *,
    processor: Any = None,
    progress: Progress | None = None,
    world: World | None = None,
    **options: Any,
) -> ProbeResult:
    """Measure rank collapse of `model` on `data`.

    Parameters
    ----------
    model: a Hub id, a folder, a .gguf file, "demo", "demo-decoder", or a transformers model that you hold (it is left as it was)
    data: a file, a folder of images or sounds, a Hub dataset `name[:config][:split]`, a list of texts, PIL
        images, arrays (N,) or pairs (array, sampling rate), a datasets.Dataset, a DataFrame; None takes the
        bundled samples
    processor: tokenizer, image processor or feature extractor of a model that you hold
    progress: called as progress(stage, done, total)
    world: the processes that share the work, `World.join()`; each gets the whole result. Without it, this
        process measures everything
    options: those of the command, by the same names with _ for - (`rc-probe --help`): dtype, samples, length,
        metrics, ablate, init … `rc_probe.settings.Settings` has them all. `path_draws` is what `--paths 5 20` gives

    Returns a ProbeResult with the tables of docs/tables.md.
    Raises RcProbeError, one clear line, for bad input and for models that cannot be proved.
    """
    try:
        chosen = Settings.of(data=data, **options)
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        _check_call(model, chosen, processor, progress, world)
        return measure(model, chosen, processor=processor, progress=progress, world=world)
    except RcProbeError as error:
        raise in_python(error, Settings) from error


def _check_call(model: Any, chosen: CommonOptions, processor: Any, progress: Any, world: Any) -> None:
    """RcProbeError for what only Python can get wrong."""
    check_processor("processor", model, processor)
    check_callable("progress", progress)
    check_world(world)
    for each in fields(chosen):
        if (
            each.name in OF_LOADING
            and not isinstance(model, str)
            and getattr(chosen, each.name) != each.default
        ):
            raise loaded_already(each.name)


def check_processor(name: str, model: Any, processor: Any) -> None:
    """RcProbeError for what is no processor, and for one of a model that is loaded by name."""
    if isinstance(model, str) and processor is not None:
        todo = "Leave it out, or give the model itself"
        raise RcProbeError("a model that is loaded by name brings its own", where=name, todo=todo)
    check_callable(name, processor)


def check_callable(name: str, value: Any) -> None:
    if value is not None and not callable(value):
        what = f"{type(value).__name__} is none"
        raise RcProbeError(what, where=name, todo="Give what can be called")


def check_world(world: Any) -> None:
    if not isinstance(world, World | None):
        raise RcProbeError(f"{type(world).__name__} is none", where="world", todo="Give World.join()")


def loaded_already(name: str) -> RcProbeError:
    """The refusal of an option of loading for a model that is held."""
    what = "it says how a model is loaded, and this one is"
    return RcProbeError(what, where=name, todo="Leave it out, and load the model as it should be")


def measure(
    model: Any,
    chosen: CommonOptions,
    *,
    processor: Any = None,
    progress: Progress | None = None,
    command: str | None = None,
    world: World | None = None,
    keep_interrupted: bool = False,
    proved: Callable[[int], None] | None = None,
) -> ProbeResult:
    """What `probe` does, with all options in `chosen`. `command` is what repeats it, made up if not given.

    proved: called with the number of blocks before anything is measured
    keep_interrupted: an interrupt (Ctrl-C) ends the measurements that are still to come, and what is finished is the
    result; its settings say so under `missing`
    """
    started = time.monotonic()
    chosen.check()
    asked, chosen = chosen, with_defaults(model, chosen)
    check_place(chosen.data)
    together = world or World()

    def report(stage: str, done: int, total: int) -> None:
        together.check()
        if progress is not None:
            progress(stage, done, total)

    report("loading", 0, 1)
    loaded = (
        load_named(model, chosen, together)
        if isinstance(model, str)
        else hold_model(model, processor, stack=chosen.stack, blocks=chosen.blocks)
    )
    samples = load_samples(
        chosen.data, modality=loaded.modality, column=chosen.column, label_column=chosen.label_column,
        samples=chosen.samples or SAMPLES, fits=long_enough(loaded, chosen.special_tokens),
    )  # fmt: skip
    made = batches(
        samples, loaded, length=chosen.length, batch_size=chosen.batch_size,
        special_tokens=chosen.special_tokens,
    )  # fmt: skip
    run = Run(
        loaded, chosen, samples, made, report, together,
        held=not isinstance(model, str), keep_interrupted=keep_interrupted,
    )  # fmt: skip
    if proved is not None:
        proved(run.structure.depth)
    together.same(facts(chosen, samples, made, run.structure))
    settings = _settings(
        chosen, loaded, samples, made, command or _as_command(model, loaded, asked), together
    )
    del loaded, made  # the run alone holds the weights, and lets go of them
    run.measure()
    return ProbeResult(
        model=run.describe(),
        settings=settings | {"missing": run.missing},
        environment=environment(time.monotonic() - started),
        tables=run.tables(),
    )


def load_named(model: str, chosen: ModelAndData, world: World) -> Loaded:
    with nullcontext() if is_here(model) else world.local_first():
        return load_model(
            model, revision=chosen.revision, dtype=chosen.dtype, device=own_device(chosen, world),
            allow_pickle=chosen.allow_pickle, trust_remote_code=chosen.trust_remote_code, stack=chosen.stack,
            blocks=chosen.blocks, device_map=chosen.device_map, offload_folder=chosen.offload_folder,
        )  # fmt: skip


def _settings(
    chosen: CommonOptions, loaded: Loaded, samples: Samples, made: Batches, command: str, world: World
) -> dict[str, Any]:
    count, idle = len(samples.items), max(world.size - len(made), 0)
    waits = (
        f"{idle} of {world.size} processes had no batch: a smaller --batch-size gives more" if idle else ""
    )
    unused = [
        flag(each)
        for each in fields(chosen)
        if each.name in OF_TEXTS and getattr(chosen, each.name) != each.default
    ]
    of_texts = (
        f"{' and '.join(unused)} changed nothing: only texts have tokens"
        if unused and made.length is None
        else ""
    )
    return {
        "data": samples.source, "column": samples.column, "label_column": chosen.label_column, "digest": digest_of(samples.items), "modality": loaded.modality, "samples": count, "length": made.length,
        "batch_size": chosen.batch_size, "tokens": made.tokens, "truncated": made.truncated,
        **dtype_and_device(loaded.model), "processes": world.size,
        "seed": chosen.seed, "init_seeds": chosen.init_seeds if chosen.init else 0,
        "special_tokens": chosen.special_tokens,
        **{key: value for each in MEASUREMENTS for key, value in each.entries(chosen, count).items()},
        "notes": [note for note in (samples.note, made.note, waits, of_texts) if note],
        "command": command,
    }  # fmt: skip


def _as_command(model: Any, loaded: Loaded, chosen: CommonOptions) -> str:
    """The command that repeats a probe made from Python, as far as a command can."""
    if not isinstance(model, str):  # which may have been cast
        chosen = replace(chosen, dtype=_dtype(loaded.model))
    return shlex.join(replace(chosen, revision=loaded.revision).words(loaded.id))


def dtype_and_device(model: Any) -> dict[str, str]:
    """What its weights are, and where."""
    places = getattr(model, "hf_device_map", None) or {"": model.device}
    return {
        "dtype": ", ".join(filter(None, [_dtype(model), name_of_rounding(model)])),
        "device": ", ".join(sorted({str(place) for place in places.values()})),
    }


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def environment(seconds: float) -> dict[str, Any]:
    import transformers

    return {
        "rc_probe": rc_probe.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "platform": platform.platform(terse=True),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "seconds": round(seconds, 2),
    }  # fmt: skip
