"""`rc_probe.probe`: the whole measurement of one model, from a name and data to a ProbeResult."""

from __future__ import annotations

import datetime
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import rc_probe
from rc_probe.data.batches import Batches, batches, long_enough
from rc_probe.data.digest import digest_of
from rc_probe.data.samples import Samples, load_samples
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import Structure
from rc_probe.measures.below_float_floor import below_the_floor
from rc_probe.measures.curves import Curves, check_finite, gather_curves
from rc_probe.measures.rows import ablation_rows, structure_rows
from rc_probe.measures.variant_passes import measure_variants
from rc_probe.measures.variants import Variant, mixer_note, paper_variants, parse_ablation
from rc_probe.models.fresh_weights import fresh_model
from rc_probe.models.load import Loaded, hold_model, load_model
from rc_probe.models.locate import DEMO, on_hub
from rc_probe.paths.tables import PathPlan, measure_paths, plan_paths
from rc_probe.processes.agreement import facts, own_device
from rc_probe.processes.world import World
from rc_probe.results.tables import TABLES, Row

from .result import ProbeResult
from .settings import Settings

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[str, int, int], None]
DEMO_NAME = "all-MiniLM-L6-v2"  # what `demo` stands for


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
    model: a Hub id, a folder, "demo", or a transformers model that you hold (it is left as it was)
    data: a file, a folder of images or sounds, a Hub dataset `name[:config][:split]`, a list of texts, PIL
        images, arrays (N,) or pairs (array, sampling rate), a datasets.Dataset, a DataFrame; None takes the
        bundled samples
    processor: tokenizer, image processor or feature extractor of a model that you hold
    progress: called as progress(stage, done, total)
    world: the processes that share the work, `World.join()`; each gets the whole result. Without it, this
        process measures everything
    options: the fields of `Settings`. Of a model by name: revision, dtype, device, device_map, offload_folder,
        allow_pickle, trust_remote_code. Which part of it: stack, blocks. Of the data: column, label_column, samples,
        length, batch_size, special_tokens. Of what is measured: metrics, svd_samples, init, init_seeds, seed, ablate,
        recursion. Of the paths: paths, path_draws, repeats, path_samples, max_length, count_mlp

    Returns a ProbeResult with the tables residuals, ablations, structure, recursion, bounds, paths, path_sources,
    path_counts, chains.
    Raises RcProbeError, one clear line, for bad input and for models that cannot be proved.
    """
    chosen = Settings.of(data=data, **options)
    return measure(model, chosen, processor=processor, progress=progress, world=world)


def measure(
    model: Any,
    chosen: Settings,
    *,
    processor: Any = None,
    progress: Progress | None = None,
    command: str | None = None,
    world: World | None = None,
) -> ProbeResult:
    """What `probe` does, with all options in `chosen`. `command` is what repeats it, made up if not given."""
    started = time.monotonic()
    chosen.check()
    ablations = [parse_ablation(text) for text in dict.fromkeys(chosen.ablate)]
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
    plan = (
        plan_paths(loaded, samples, chosen) if chosen.paths else None
    )  # labels that cannot be meant end it here
    run = _Run(loaded, chosen, made, ablations, report, together)
    together.same(facts(chosen, samples, made, run.structure))
    run.measure()
    if plan is not None:
        run.measure_paths(plan)
    return ProbeResult(
        model=run.describe(),
        settings=_settings(chosen, loaded, samples, made, command, together),
        environment=_environment(time.monotonic() - started),
        tables=run.tables(),
    )


def _load(model: str, chosen: Settings, world: World) -> Loaded:
    with world.local_first() if on_hub(model) else nullcontext():
        return load_model(
            model, revision=chosen.revision, dtype=chosen.dtype, device=own_device(chosen, world),
            allow_pickle=chosen.allow_pickle, trust_remote_code=chosen.trust_remote_code, stack=chosen.stack,
            blocks=chosen.blocks, device_map=chosen.device_map, offload_folder=chosen.offload_folder,
        )  # fmt: skip


class _Run:
    """The passes of one probe, and the tables that they fill."""

    def __init__(
        self,
        loaded: Loaded,
        chosen: Settings,
        made: Batches,
        ablations: list[Variant],
        report: Progress,
        world: World,
    ) -> None:
        self.loaded, self.chosen, self.made, self.report, self.world = loaded, chosen, made, report, world
        report("proving the structure", 0, 1)
        self.first = next(iter(made))
        self.example = self.first.inputs
        self.structure = self._structure(loaded.model)
        self.paper = paper_variants(self.structure)
        self.variants = [*self.paper, *ablations]
        seeds = chosen.init_seeds if chosen.init else 0
        self.mine = world.share(range(len(made)))  # numbers of the batches that this process measures
        self.total = len(self.mine) * (len(self.variants) + seeds * len(self.paper))
        self.done = 0
        self.curves: dict[str, dict[str, Curves]] = {}
        self.rows: dict[str, list[Row]] = {}
        self.notes: list[str] = []
        self.path_facts: dict[str, Any] = {}

    def _structure(self, model: Any) -> Structure:
        return find_structure(model, self.example, stack=self.loaded.stack, blocks=self.chosen.blocks)

    def measure(self) -> None:
        self.curves["pretrained"] = self._curves(self.structure, self.variants, "pretrained")
        check_finite(self.structure, self.curves["pretrained"])
        if self.chosen.recursion:
            self._below_the_floor(self.structure, "pretrained")
        for number in range(self.chosen.init_seeds if self.chosen.init else 0):
            self._measure_init(self.chosen.seed + number, first=number == 0)

    def measure_paths(self, plan: PathPlan) -> None:
        """After the curves: a model whose paths cannot be told apart has these all the same."""

        def advance(stage: str) -> None:
            self.report(f"paths: {stage}", self.done, self.total)

        advance("exact")
        found = self.world.once(
            lambda: measure_paths(self.loaded, self.structure, plan, self.chosen, self._name, advance),
            "paths",
        )
        self.rows |= found.tables
        self.path_facts = found.facts
        self.notes += found.notes

    @property
    def _name(self) -> str:
        return DEMO_NAME if self.loaded.id == DEMO else self.loaded.id

    def _measure_init(self, seed: int, *, first: bool) -> None:
        try:
            fresh = fresh_model(self.loaded, seed)
            structure = self._structure(fresh)
        except RcProbeError as error:  # such as output projections that start at zero
            self.notes.append(f"Fresh weights were not measured: {error}")
            return
        curves = self._curves(structure, self.paper, f"init, seed {seed}")
        if self.chosen.init_seeds > 1:
            names = TABLES["init_seeds"].names
            rows = (row for v in curves for row in curves[v].rows(seed=seed, variant=v))
            self.rows.setdefault("init_seeds", []).extend({key: row[key] for key in names} for row in rows)
        if not first and "init" in self.curves:
            for name, mine in self.curves["init"].items():
                mine.merge(curves[name])
            return
        self.curves["init"] = curves
        if self.chosen.recursion:
            self._below_the_floor(structure, "init")

    def _below_the_floor(self, structure: Structure, weights: str) -> None:
        self.report(f"{weights}: below the float floor", self.done, self.total)
        below = self.world.once(
            lambda: below_the_floor(structure, self.first, weights), f"{weights}: recursion"
        )
        self.rows.setdefault("recursion", []).extend(below.recursion)
        self.rows.setdefault("bounds", []).extend(below.bounds)
        self.notes += below.notes

    def _curves(self, structure: Structure, variants: Sequence[Variant], stage: str) -> dict[str, Curves]:
        def advance(name: str) -> None:
            self.done += 1
            self.report(f"{stage}: {name}", self.done, self.total)

        curves, notes = measure_variants(
            structure, self.made.of(self.mine), variants, self.chosen.measured, few=self.chosen.svd_samples,
            advance=advance,
        )  # fmt: skip
        self.notes += [note for note in notes if note not in self.notes]
        return gather_curves(curves, partial(self.world.gather, what=stage))

    def tables(self) -> dict[str, pd.DataFrame]:
        residuals = [
            row
            for weights, curves in self.curves.items()
            for v in curves
            for row in curves[v].rows(weights=weights, variant=v)
        ]
        tables = {
            "residuals": residuals,
            "ablations": ablation_rows(self.curves["pretrained"], self.variants, self.structure.depth),
            **self.rows,
            "structure": structure_rows(self.structure),
        }
        return {name: TABLES[name].frame(rows) for name, rows in tables.items() if rows}

    def describe(self) -> dict[str, Any]:
        """The entry `model` of the results."""
        model, structure = self.loaded.model, self.structure
        heads = {
            b.ops[0].heads for block in structure.blocks for b in block.branches if b.ops and b.ops[0].heads
        }
        norms = [bool(j.norms) for block in structure.blocks for j in block.junctions]
        return {
            "id": self._name,
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
            "paths": self.path_facts,
            "notes": self.loaded.notes + self._stack_notes() + self.notes,
        }

    def _stack_notes(self) -> list[str]:
        """What of a model of several stacks was measured, and what was not."""
        others = [*self.loaded.others, *self.structure.others]
        notes = [f"Not measured: the stacks {', '.join(others)} (choose one by --stack)."] if others else []
        notes += [f"Not measured: {why}" for why in self.structure.refused if "block" in why]
        return [*notes, *filter(None, [mixer_note(self.structure)])]


def _settings(
    chosen: Settings, loaded: Loaded, samples: Samples, made: Batches, command: str | None, world: World
) -> dict[str, Any]:
    count, idle = len(samples.items), max(world.size - len(made), 0)
    waits = (
        f"{idle} of {world.size} processes had no batch: a smaller --batch-size gives more" if idle else ""
    )
    places = getattr(loaded.model, "hf_device_map", None) or {"": loaded.model.device}
    return {
        "data": samples.source, "digest": digest_of(samples.items), "modality": loaded.modality, "samples": count, "length": made.length,
        "batch_size": chosen.batch_size, "tokens": made.tokens, "truncated": made.truncated,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": ", ".join(sorted({str(place) for place in places.values()})), "processes": world.size,
        "seed": chosen.seed, "init_seeds": chosen.init_seeds if chosen.init else 0,
        "special_tokens": chosen.special_tokens, "metrics": chosen.measured, "ablate": list(chosen.ablate),
        "svd_samples": min(chosen.svd_samples, count),
        "notes": [note for note in (samples.note, made.note, waits) if note],
        "command": command or _as_command(loaded, chosen),
    }  # fmt: skip


def _as_command(loaded: Loaded, chosen: Settings) -> str:
    """The command that repeats a probe made from Python, as far as a command can."""
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return shlex.join(replace(chosen, dtype=dtype, revision=loaded.revision).words(loaded.id))


def _environment(seconds: float) -> dict[str, Any]:
    import transformers

    return {
        "rc_probe": rc_probe.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "platform": platform.platform(terse=True),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "seconds": round(seconds, 2),
    }  # fmt: skip
