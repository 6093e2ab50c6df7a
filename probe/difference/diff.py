"""`rc_probe.diff`: two models on the same samples, from names and data to a DiffResult."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import fields, replace
from typing import Any

from rc_probe.api import OF_LOADING, check_callable, check_processor, check_world, environment, loaded_already
from rc_probe.data.batches import long_enough
from rc_probe.data.digest import digest_of
from rc_probe.data.places import check_place
from rc_probe.data.samples import Samples, load_samples
from rc_probe.hooks.errors import RcProbeError
from rc_probe.models.load import Loaded
from rc_probe.models.packaged import SAMPLES, with_defaults
from rc_probe.options import in_python
from rc_probe.processes.agreement import facts
from rc_probe.processes.world import World
from rc_probe.results.tables import DIFFED
from rc_probe.run import Progress

from .lockstep import Lockstep
from .options import DiffOptions
from .pair import Pair, load_pair, pair_of
from .predictions import choose_predictions
from .result import DiffResult


def diff(
    a: Any,
    b: Any,
    data: Any = None,
    *,
    processor: Any = None,
    processor_b: Any = None,
    progress: Progress | None = None,
    world: World | None = None,
    **options: Any,
) -> DiffResult:
    """How far model `b` is from model `a` on `data`: by layer, by block and branch, in its predictions.

    >>> found = rc_probe.diff("demo", "demo", quantise_b="int8")          # doctest: +SKIP
    >>> found.differences.query("component == 'block'")                    # doctest: +SKIP
    >>> found.fail_if("difference_bulk@max>0.05")                          # doctest: +SKIP

    Parameters
    ----------
    a, b: as in `rc_probe.probe`, a name or a transformers model that you hold (it is left as it was). Both are in
        memory at once. One that is the other with an adapter or other weights must be a copy of its own
    data: as in `rc_probe.probe`; the same samples, as the same inputs, go through both
    processor, processor_b: of models that you hold; without processor_b, that of where `b` was loaded from, else that of `a`
    progress: called as progress(stage, done, total)
    world: the processes that share the samples, `World.join()`; each holds both models and gets the whole result
    options: those of `rc-probe diff`, by the same names with _ for -: dtype, dtype_b, attention_b, quantise_b, samples,
        length, metrics, cka, sensitivity, threshold …

    Raises RcProbeError, one clear line, for bad input, for models that cannot be proved, and where the two do not get
    the same inputs (another tokenizer, another size of images).
    """
    try:
        chosen = DiffOptions.of(data=data, **options)
        check_callable("progress", progress)
        check_world(world)
        a, b = (os.fspath(one) if isinstance(one, os.PathLike) else one for one in (a, b))
        return difference(
            a, b, chosen, processor=processor, processor_b=processor_b, progress=progress, world=world
        )
    except RcProbeError as error:
        raise in_python(error, DiffOptions) from error


def difference(
    a: Any,
    b: Any,
    chosen: DiffOptions,
    *,
    processor: Any = None,
    processor_b: Any = None,
    progress: Progress | None = None,
    command: str | None = None,
    fit: Any = None,
    world: World | None = None,
) -> DiffResult:
    """What `diff` does, with all options in `chosen`. command: what repeats it, made up if not given.

    fit: called with both models' blocks before anything is measured
    """
    started, world = time.monotonic(), world or World()

    def report(stage: str, done: int, total: int) -> None:
        world.check()
        if progress is not None:
            progress(stage, done, total)

    chosen.check()
    check_place(chosen.data)
    _check_held(a, b, chosen, processor, processor_b)
    report("loading", 0, 1)
    loaded = load_pair(a, b, chosen, processor, processor_b, world)
    samples = load_samples(
        chosen.data, modality=loaded[0].modality, column=chosen.column, label_column=chosen.label_column,
        samples=with_defaults(a, chosen).samples or SAMPLES, fits=long_enough(loaded[0], chosen.special_tokens),
    )  # fmt: skip
    report("proving both structures", 0, 1)
    pair = pair_of(loaded, samples, chosen)
    if fit is not None:
        fit(pair.a.structure.depth)
    for side in (pair.a, pair.b):
        world.same(facts(chosen, samples, side.made, side.structure))
    predictions, notes = choose_predictions(pair, samples, chosen)
    lockstep = Lockstep(pair, chosen, predictions, world)
    total, done = len(world.share(range(len(pair.a.made)))) * lockstep.passes, 0

    def advance(stage: str) -> None:
        nonlocal done
        done += stage != "predictions"
        report(stage, done, total)

    lockstep.run(advance)
    lockstep.run_task(advance)
    lockstep.together()
    table = DIFFED["differences"].frame(lockstep.rows())
    told = [*pair.notes, *notes, *lockstep.notes]
    return DiffResult(
        a=pair.a.entry,
        b=pair.b.entry,
        settings=_settings(pair, samples, chosen, told, command or _as_command(loaded, chosen))
        | {"processes": world.size, "predictions": predictions.facts() if predictions else None},
        environment=environment(time.monotonic() - started),
        tables={"differences": table},
    )


def _check_held(a: Any, b: Any, chosen: DiffOptions, processor: Any, processor_b: Any) -> None:
    """RcProbeError for options and processors that the models cannot use."""
    check_processor("processor", a, processor)
    check_processor("processor_b", b, processor_b)
    held = not isinstance(a, str) and not isinstance(b, str)
    for each in fields(chosen):
        of_b = each.name.endswith("_b")
        if getattr(chosen, each.name) == each.default or not (each.name in OF_LOADING or of_b):
            continue
        if (of_b and not isinstance(b, str)) or held:
            raise loaded_already(each.name)


def _settings(
    pair: Pair, samples: Samples, chosen: DiffOptions, notes: list[str], command: str
) -> dict[str, Any]:
    made = pair.a.made
    return {
        "data": samples.source, "column": samples.column, "label_column": chosen.label_column,
        "digest": digest_of(samples.items), "modality": pair.a.loaded.modality, "samples": len(samples.items),
        "length": made.length, "batch_size": chosen.batch_size, "tokens": made.tokens, "truncated": made.truncated,
        "special_tokens": chosen.special_tokens, "seed": chosen.seed, "metrics": list(chosen.measured),
        "threshold": chosen.threshold, "notes": [note for note in (samples.note, *notes) if note], "command": command,
    }  # fmt: skip


def _as_command(loaded: tuple[Loaded, Loaded], chosen: DiffOptions) -> str:
    """The command that repeats a difference made from Python, as far as a command can."""
    a, b = loaded
    return shlex.join(replace(chosen, revision=a.revision).words_of_two(a.id, b.id))
