"""`rc_probe.probe`: the whole measurement of one model, from a name and data to a ProbeResult."""

from __future__ import annotations

import datetime
import gc
import platform
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

import rc_probe
from rc_probe.common_options import CommonOptions
from rc_probe.data.batches import Batches, batches, long_enough
from rc_probe.data.digest import digest_of
from rc_probe.data.samples import Samples, load_samples
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.errors import RcProbeError, out_of_memory, reason
from rc_probe.hooks.structure.structure import Structure
from rc_probe.interventions.paper import mixer_note
from rc_probe.measures import MEASUREMENTS, TABLES
from rc_probe.measures.context import Context
from rc_probe.measures.measurement import Found, Measurement
from rc_probe.models.fresh_weights import fresh_model
from rc_probe.models.load import Loaded, hold_model, load_model
from rc_probe.models.locate import on_hub
from rc_probe.models.packaged import DEMOS
from rc_probe.models.structure_table import structure_rows
from rc_probe.processes.agreement import facts, own_device
from rc_probe.processes.heartbeat import ElsewhereError
from rc_probe.processes.world import World
from rc_probe.results.tables import Row

from .result import ProbeResult
from .settings import Settings

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[str, int, int], None]


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
    chosen = Settings.of(data=data, **options)
    return measure(model, chosen, processor=processor, progress=progress, world=world)


def measure(
    model: Any,
    chosen: CommonOptions,
    *,
    processor: Any = None,
    progress: Progress | None = None,
    command: str | None = None,
    world: World | None = None,
    keep_interrupted: bool = False,
) -> ProbeResult:
    """What `probe` does, with all options in `chosen`. `command` is what repeats it, made up if not given.

    keep_interrupted: an interrupt (Ctrl-C) ends the measurements that are still to come, and what is finished is the
    result; its settings say so under `missing`
    """
    started = time.monotonic()
    chosen.check()
    together = world or World()

    def report(stage: str, done: int, total: int) -> None:
        together.check()
        if progress is not None:
            progress(stage, done, total)

    report("loading", 0, 1)
    loaded = (
        _load(model, chosen, together)
        if isinstance(model, str)
        else hold_model(model, processor, stack=chosen.stack, blocks=chosen.blocks)
    )
    samples = load_samples(
        chosen.data, modality=loaded.modality, column=chosen.column, label_column=chosen.label_column,
        samples=chosen.samples, fits=long_enough(loaded, chosen.special_tokens),
    )  # fmt: skip
    made = batches(
        samples, loaded, length=chosen.length, batch_size=chosen.batch_size,
        special_tokens=chosen.special_tokens,
    )  # fmt: skip
    run = _Run(loaded, chosen, samples, made, report, together, keep_interrupted)
    together.same(facts(chosen, samples, made, run.structure))
    run.measure()
    return ProbeResult(
        model=run.describe(),
        settings=_settings(
            chosen, loaded, samples, made, command or _as_command(model, loaded, chosen), together
        )
        | {"missing": run.missing},
        environment=_environment(time.monotonic() - started),
        tables=run.tables(),
    )


def _load(model: str, chosen: CommonOptions, world: World) -> Loaded:
    with world.local_first() if on_hub(model) else nullcontext():
        return load_model(
            model, revision=chosen.revision, dtype=chosen.dtype, device=own_device(chosen, world),
            allow_pickle=chosen.allow_pickle, trust_remote_code=chosen.trust_remote_code, stack=chosen.stack,
            blocks=chosen.blocks, device_map=chosen.device_map, offload_folder=chosen.offload_folder,
        )  # fmt: skip


class _Run:
    """The measurements of one probe, on the pretrained weights and then on fresh ones, and what they found."""

    def __init__(
        self,
        loaded: Loaded,
        chosen: CommonOptions,
        samples: Samples,
        made: Batches,
        report: Progress,
        world: World,
        keep_interrupted: bool,
    ) -> None:
        self.keep_interrupted = keep_interrupted and world.size == 1  # else the others would wait
        self.missing: dict[str, str] = {}  # of measurements that did not finish: why
        self.loaded, self.chosen, self.made, self.report, self.world = loaded, chosen, made, report, world
        self.wanted = [each for each in MEASUREMENTS if each.wanted(chosen)]
        plans = {each.name: each.plan(loaded, samples, chosen) for each in self.wanted}
        report("proving the structure", 0, 1)
        self.example = next(iter(made)).inputs
        self.structure = self._structure(loaded.model)
        self.context = Context(
            loaded, self.structure, samples, made, chosen, world, name=DEMOS[loaded.id].name if loaded.id in DEMOS else loaded.id,
            plans=plans, report=self._advance,
        )  # fmt: skip
        self.found: dict[str, dict[str, Found]] = {}  # by weights and measurement
        self.notes: list[str] = []
        self.total = sum(each.passes(context) for context in self._planned() for each in self._of(context))
        self.done = 0

    def _structure(self, model: Any) -> Structure:
        return find_structure(model, self.example, stack=self.loaded.stack, blocks=self.chosen.blocks)

    def _planned(self) -> Iterator[Context]:
        """The weights that are measured, of which fresh ones are not there yet."""
        yield self.context
        for nth in range(self.chosen.init_seeds if self.chosen.init else 0):
            yield replace(self.context, weights="init", seed=self.chosen.seed + nth)

    def _of(self, context: Context) -> list[Measurement]:
        return [each for each in self.wanted if each.on_fresh or context.weights == "pretrained"]

    def measure(self) -> None:
        try:
            for planned in self._planned():
                self._measure(planned)
        except KeyboardInterrupt as interrupt:
            done = self.found.get("pretrained", {})
            if not self.keep_interrupted or any(
                each.needed and each.name not in done for each in self.wanted
            ):
                raise
            for each in self.wanted:
                if each.name not in done:
                    self._leave_out(each.name, each.subject, interrupt)
            if self.chosen.init and not self.found.get("init"):
                self._leave_out("init", "Fresh weights were", interrupt)

    def _measure(self, planned: Context) -> None:
        try:
            context = planned if planned.seed is None else self._fresh(planned, planned.seed)
        except Exception as error:  # output projections that start at zero, no memory for a second model
            if planned.seed is None or not _others_go_on(error):
                raise
            self._leave_out("init", "Fresh weights were", error)
            return
        found = self.found.setdefault(context.weights, {})
        reading = {each.name: each.reader(context) for each in self._of(context)}
        context = replace(context, found=found, readers={k: v for k, v in reading.items() if v is not None})
        for each in self._of(context):
            found[each.name] = self._one(each, replace(context, before=found.get(each.name)))

    def _fresh(self, context: Context, seed: int) -> Context:
        model = fresh_model(self.loaded, seed)
        return replace(context, loaded=replace(self.loaded, model=model), structure=self._structure(model))

    def _one(self, each: Measurement, context: Context) -> Found:
        """What it found; one that cannot be done on this model is a note, and the others go on."""

        def attempt() -> Found:
            try:
                return each.run(context)
            except Exception as error:
                together = each.shared and self.world.size > 1  # the others wait for its numbers
                needed = each.needed and context.weights == "pretrained"
                if together or needed or not _others_go_on(error):
                    raise
                weights = "" if context.weights == "pretrained" else ", fresh weights,"
                note = f"{each.subject}{weights} not measured: {_why(error)}"
                return context.before or Found(notes=[note], missing=_why(error))

        found = attempt() if each.shared else self.world.once(attempt, f"{context.weights}: {each.name}")
        if found.missing:
            self.missing[each.name] = found.missing
        return found

    def _leave_out(self, name: str, subject: str, error: BaseException) -> None:
        self.missing[name] = _why(error)
        self.notes.append(f"{subject} not measured: {_why(error)}")

    def _advance(self, stage: str, passes: int) -> None:
        self.done += passes
        self.report(stage, self.done, self.total)

    def tables(self) -> dict[str, pd.DataFrame]:
        rows: dict[str, list[Row]] = {}
        for each in (one for found in self.found.values() for one in found.values()):
            for name, more in each.tables.items():
                rows.setdefault(name, []).extend(more)
        rows["structure"] = structure_rows(self.structure)
        return {name: TABLES[name].frame(rows[name]) for name in TABLES if rows.get(name)}

    def _facts(self, each: Measurement) -> dict[str, Any]:
        found = self.found["pretrained"].get(each.name)
        return found.facts if found else {}

    def _all_notes(self) -> list[str]:
        """Of the run and of its measurements, each once."""
        theirs = (note for found in self.found.values() for each in found.values() for note in each.notes)
        return list(dict.fromkeys([*self.loaded.notes, *self._stack_notes(), *self.notes, *theirs]))

    def describe(self) -> dict[str, Any]:
        """The entry `model` of the results."""
        model, structure = self.loaded.model, self.structure
        heads = {
            b.ops[0].heads for block in structure.blocks for b in block.branches if b.ops and b.ops[0].heads
        }
        norms = [bool(j.norms) for block in structure.blocks for j in block.junctions]
        return {
            "id": self.context.name,
            "class": type(model).__name__,
            "model_type": getattr(model.config, "model_type", None),
            "revision": self.loaded.revision,
            "parameters": sum(p.numel() for p in model.parameters()),
            "blocks": structure.depth,
            "dim": structure.dim,
            "heads": heads.pop() if len(heads) == 1 else None,
            "signature": structure.signature,
            "norm": "post-LN" if all(norms) else "mixed" if any(norms) else "pre-LN",
            "attention": getattr(model.config, "_attn_implementation", None),
            "stack": structure.name,
            "stacks": [*self.loaded.others, *structure.others],
            "proved": list(structure.proved),
            **{each.name: self._facts(each) for each in MEASUREMENTS if each.has_findings},
            "notes": self._all_notes(),
        }

    def _stack_notes(self) -> list[str]:
        """What of a model of several stacks was measured, and what was not."""
        others = [*self.loaded.others, *self.structure.others]
        notes = [f"Not measured: the stacks {', '.join(others)} (choose one by --stack)."] if others else []
        notes += [f"Not measured: {why}" for why in self.structure.refused if "block" in why]
        return [*notes, *filter(None, [mixer_note(self.structure)])]


def _others_go_on(error: Exception) -> bool:
    """Whether the measurements after one that raised this have their turn: not where another process ended the run."""
    if out_of_memory(error):
        gc.collect()
        torch.cuda.empty_cache()
    return not isinstance(error, ElsewhereError)


def _why(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, RcProbeError):
        return str(error)
    if out_of_memory(error):
        return "out of memory. Try a smaller --batch-size or --length"
    return f"a fault of rc-probe ({type(error).__name__}: {reason(error)})"


def _settings(
    chosen: CommonOptions, loaded: Loaded, samples: Samples, made: Batches, command: str, world: World
) -> dict[str, Any]:
    count, idle = len(samples.items), max(world.size - len(made), 0)
    waits = (
        f"{idle} of {world.size} processes had no batch: a smaller --batch-size gives more" if idle else ""
    )
    places = getattr(loaded.model, "hf_device_map", None) or {"": loaded.model.device}
    return {
        "data": samples.source, "digest": digest_of(samples.items), "modality": loaded.modality, "samples": count, "length": made.length,
        "batch_size": chosen.batch_size, "tokens": made.tokens, "truncated": made.truncated,
        "dtype": _dtype(loaded.model),
        "device": ", ".join(sorted({str(place) for place in places.values()})), "processes": world.size,
        "seed": chosen.seed, "init_seeds": chosen.init_seeds if chosen.init else 0,
        "special_tokens": chosen.special_tokens,
        **{key: value for each in MEASUREMENTS for key, value in each.entries(chosen, count).items()},
        "notes": [note for note in (samples.note, made.note, waits) if note],
        "command": command,
    }  # fmt: skip


def _as_command(model: Any, loaded: Loaded, chosen: CommonOptions) -> str:
    """The command that repeats a probe made from Python, as far as a command can."""
    if not isinstance(model, str):  # which may have been cast
        chosen = replace(chosen, dtype=_dtype(loaded.model))
    return shlex.join(replace(chosen, revision=loaded.revision).words(loaded.id))


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _environment(seconds: float) -> dict[str, Any]:
    import transformers

    return {
        "rc_probe": rc_probe.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "platform": platform.platform(terse=True),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "seconds": round(seconds, 2),
    }  # fmt: skip
