"""`rc_probe.probe`: the whole measurement of one model, from a name and data to a ProbeResult."""

from __future__ import annotations

import datetime
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch

import rc_probe
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.prove import find_structure
from rc_probe.hooks.structure import Structure

from .batches import Batches, batches, long_enough
from .data import Samples, load_samples
from .floor import below_the_floor
from .fresh import fresh_model
from .load import Loaded, hold_model, load_model
from .results import ProbeResult
from .run import Curves, Row, ablation_rows, check_finite, measure_variants, structure_rows
from .settings import Settings
from .source import DEMO
from .variants import Variant, mixer_note, paper_variants, parse_ablation

Progress = Callable[[str, int, int], None]
DEMO_NAME = "all-MiniLM-L6-v2"  # what `demo` stands for


def probe(
    model: Any,
    data: Any = None,
    *,
    processor: Any = None,
    progress: Progress | None = None,
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
    options: the fields of `Settings`. Of a model by name: revision, dtype, device, allow_pickle,
        trust_remote_code. Which part of it: stack, blocks. Of the data: column, label_column, samples, length, batch_size, special_tokens. Of what is
        measured: metrics, svd_samples, init, init_seeds, seed, ablate, recursion

    Returns a ProbeResult with the tables residuals, ablations, structure, recursion, bounds.
    Raises RcProbeError, one clear line, for bad input and for models that cannot be proved.
    """
    return measure(model, Settings.of(data=data, **options), processor=processor, progress=progress)


def measure(
    model: Any,
    chosen: Settings,
    *,
    processor: Any = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> ProbeResult:
    """What `probe` does, with all options in `chosen`. `command` is what repeats it, made up if not given."""
    started = time.monotonic()
    chosen.check()
    ablations = [parse_ablation(text) for text in dict.fromkeys(chosen.ablate)]
    report = progress or (lambda stage, done, total: None)
    report("loading", 0, 1)
    loaded = (
        _load(model, chosen)
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
    run = _Run(loaded, chosen, made, ablations, report)
    run.measure()
    return ProbeResult(
        model=run.describe(),
        settings=_settings(chosen, loaded, samples, made, command),
        environment=_environment(time.monotonic() - started),
        tables=run.tables(),
    )


def _load(model: str, chosen: Settings) -> Loaded:
    return load_model(
        model, revision=chosen.revision, dtype=chosen.dtype, device=chosen.device,
        allow_pickle=chosen.allow_pickle, trust_remote_code=chosen.trust_remote_code, stack=chosen.stack,
        blocks=chosen.blocks,
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
    ) -> None:
        self.loaded, self.chosen, self.made, self.report = loaded, chosen, made, report
        report("proving the structure", 0, 1)
        self.first = next(iter(made))
        self.example = self.first.inputs
        self.structure = self._structure(loaded.model)
        self.paper = paper_variants(self.structure)
        self.variants = [*self.paper, *ablations]
        seeds = chosen.init_seeds if chosen.init else 0
        self.total = len(made) * (len(self.variants) + seeds * len(self.paper))
        self.done = 0
        self.curves: dict[str, dict[str, Curves]] = {}
        self.rows: dict[str, list[Row]] = {}
        self.notes: list[str] = []

    def _structure(self, model: Any) -> Structure:
        return find_structure(model, self.example, stack=self.loaded.stack, blocks=self.chosen.blocks)

    def measure(self) -> None:
        self.curves["pretrained"] = self._curves(self.structure, self.variants, "pretrained")
        check_finite(self.structure, self.curves["pretrained"])
        if self.chosen.recursion:
            self._below_the_floor(self.structure, "pretrained")
        for number in range(self.chosen.init_seeds if self.chosen.init else 0):
            self._measure_init(self.chosen.seed + number, first=number == 0)

    def _measure_init(self, seed: int, *, first: bool) -> None:
        fresh = fresh_model(self.loaded, seed)
        try:
            structure = self._structure(fresh)
        except RcProbeError as error:  # such as output projections that start at zero
            self.notes.append(f"Fresh weights were not measured: {error}")
            return
        curves = self._curves(structure, self.paper, f"init, seed {seed}")
        if self.chosen.init_seeds > 1:
            keep = ("variant", "layer", "metric", "mean")
            self.rows.setdefault("init_seeds", []).extend(
                {"seed": seed, **{key: row[key] for key in keep}}
                for v in curves
                for row in curves[v].rows("init", v)
            )
        if not first and "init" in self.curves:
            for name, mine in self.curves["init"].items():
                mine.merge(curves[name])
            return
        self.curves["init"] = curves
        if self.chosen.recursion:
            self._below_the_floor(structure, "init")

    def _below_the_floor(self, structure: Structure, weights: str) -> None:
        self.report(f"{weights}: below the float floor", self.done, self.total)
        below = below_the_floor(structure, self.first, weights)
        self.rows.setdefault("recursion", []).extend(below.recursion)
        self.rows.setdefault("bounds", []).extend(below.bounds)
        self.notes += below.notes

    def _curves(self, structure: Structure, variants: Sequence[Variant], stage: str) -> dict[str, Curves]:
        def advance(name: str) -> None:
            self.done += 1
            self.report(f"{stage}: {name}", self.done, self.total)

        return measure_variants(
            structure, self.made, variants, self.chosen.measured, few=self.chosen.svd_samples, advance=advance
        )

    def tables(self) -> dict[str, pd.DataFrame]:
        residuals = [
            row
            for weights, curves in self.curves.items()
            for v in curves
            for row in curves[v].rows(weights, v)
        ]
        tables = {
            "residuals": residuals,
            "ablations": ablation_rows(self.curves["pretrained"], self.variants, self.structure.depth),
            **self.rows,
            "structure": structure_rows(self.structure),
        }
        return {name: pd.DataFrame(rows) for name, rows in tables.items() if rows}

    def describe(self) -> dict[str, Any]:
        """The entry `model` of the results."""
        model, structure = self.loaded.model, self.structure
        heads = {
            b.ops[0].heads for block in structure.blocks for b in block.branches if b.ops and b.ops[0].heads
        }
        norms = [bool(j.norms) for block in structure.blocks for j in block.junctions]
        return {
            "id": DEMO_NAME if self.loaded.id == DEMO else self.loaded.id,
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
            "proved": structure.proved,
            "notes": self.loaded.notes + self._stack_notes() + self.notes,
        }

    def _stack_notes(self) -> list[str]:
        """What of a model of several stacks was measured, and what was not."""
        others = [*self.loaded.others, *self.structure.others]
        notes = [f"Not measured: the stacks {', '.join(others)} (choose one by --stack)."] if others else []
        notes += [f"Not measured: {why}" for why in self.structure.refused if "block" in why]
        return [*notes, *filter(None, [mixer_note(self.structure)])]


def _settings(
    chosen: Settings, loaded: Loaded, samples: Samples, made: Batches, command: str | None
) -> dict[str, Any]:
    count = len(samples.items)
    return {
        "data": samples.source, "modality": loaded.modality, "samples": count, "length": made.length,
        "batch_size": chosen.batch_size, "tokens": made.tokens, "truncated": made.truncated,
        "dtype": str(loaded.model.dtype).removeprefix("torch."), "device": str(loaded.model.device),
        "seed": chosen.seed, "init_seeds": chosen.init_seeds if chosen.init else 0,
        "special_tokens": chosen.special_tokens, "metrics": chosen.measured, "ablate": list(chosen.ablate),
        "svd_samples": min(chosen.svd_samples, count),
        "notes": [note for note in (samples.note, made.note) if note],
        "command": command or _as_command(loaded, chosen),
    }  # fmt: skip


def _as_command(loaded: Loaded, chosen: Settings) -> str:
    """The command that repeats a probe made from Python, as far as a command can."""
    defaults = Settings()
    words = ["rc-probe", loaded.id]
    if chosen.data is not None:
        words += ["--data", chosen.data if isinstance(chosen.data, str) else "DATA-GIVEN-IN-PYTHON"]
    for name in (
        "stack",
        "blocks",
        "column",
        "label_column",
        "samples",
        "length",
        "batch_size",
        "svd_samples",
        "init_seeds",
        "seed",
    ):
        value = getattr(chosen, name)
        if value != getattr(defaults, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    words += ["--dtype", dtype] if dtype != "float32" else []
    words += ["--revision", loaded.revision] if loaded.revision else []
    for flag in ("special_tokens", "init", "recursion"):
        if not getattr(chosen, flag):
            words.append(f"--no-{flag.replace('_', '-')}")
    for text in chosen.ablate:
        words += ["--ablate", text]
    if chosen.metrics:
        words += ["--metrics", ",".join(chosen.metrics)]
    return shlex.join(words)


def _environment(seconds: float) -> dict[str, Any]:
    import transformers

    return {
        "rc_probe": rc_probe.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "platform": platform.platform(terse=True),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "seconds": round(seconds, 2),
    }  # fmt: skip
