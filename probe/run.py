"""One run: every measurement on the pretrained weights, then on fresh ones, and what they found."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from rc_probe import engine
from rc_probe.common_options import CommonOptions
from rc_probe.data.batches import Batches
from rc_probe.data.samples import Samples
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.errors import RcProbeError, out_of_memory, reason
from rc_probe.hooks.structure.side_by_side import mixed_streams
from rc_probe.hooks.structure.structure import Structure
from rc_probe.interventions.paper import mixer_note
from rc_probe.measures import MEASUREMENTS, TABLES
from rc_probe.measures.attention.first_patterns import FirstPatterns
from rc_probe.measures.context import Context
from rc_probe.measures.measurement import Found, Measurement
from rc_probe.models.fresh_weights import Blueprint, blueprint, weight_bytes
from rc_probe.models.load import Loaded
from rc_probe.models.packaged import shown_id
from rc_probe.models.structure_table import model_entry, structure_rows
from rc_probe.processes.heartbeat import ElsewhereError
from rc_probe.processes.world import FailedTogetherError, World
from rc_probe.results.checks import FAULT
from rc_probe.results.tables import Row
from rc_probe.tasks import each_once

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[str, int, int], None]
BOTH = 2**33  # bytes that a model that the user holds and fresh weights beside it may take


class Run:
    """The measurements of one probe, on the pretrained weights and then on fresh ones, and what they found."""

    def __init__(
        self,
        loaded: Loaded,
        chosen: CommonOptions,
        samples: Samples,
        made: Batches,
        report: Progress,
        world: World,
        *,
        held: bool,
        keep_interrupted: bool,
    ) -> None:
        self.keep_interrupted = keep_interrupted and world.size == 1  # else the others would wait
        self.missing: dict[str, str] = {}  # of measurements that did not finish: why
        self.loaded, self.chosen, self.held, self.report, self.world = loaded, chosen, held, report, world
        self.wanted = [each for each in MEASUREMENTS if each.wanted(chosen)]
        with each_once():
            plans = {each.name: each.plan(loaded, samples, chosen) for each in self.wanted}
        report("proving the structure", 0, 1)
        self.example = next(iter(made)).inputs
        self.notes: list[str] = []
        self.structure = self._structure(loaded.model)
        if self.structure.mixed:
            self._leave_out_edits()
        self.context = Context(
            loaded, self.structure, samples, made, chosen, world, name=shown_id(loaded.id),
            plans=plans, report=self._advance,
        )  # fmt: skip
        self.entry = self._entry(loaded.model)
        self.found: dict[str, dict[str, Found]] = {}  # by weights and measurement
        planned = [self.context, *(self._planned(seed) for seed in self.seeds)]
        self.total = sum(each.passes(context) for context in planned for each in self._of(context))
        self.done = 0

    def _structure(self, model: Any) -> Structure:
        return find_structure(
            model, self.example, stack=self.loaded.stack, blocks=self.chosen.blocks, several=True
        )

    def _leave_out_edits(self) -> None:
        """Blocks that mix several streams have no junctions: what edits them, or follows them, is not measured."""
        settings: Any = self.chosen
        for variant in settings.asked():
            variant.edits(self.structure)
        left = [each for each in self.wanted if not each.on_mixed]
        why = str(mixed_streams(self.structure.streams, self.structure.model))
        self.missing |= {each.name: why for each in left}
        self.wanted = [each for each in self.wanted if each.on_mixed]
        if left:
            self.notes.append(f"Not measured: {', '.join(each.name for each in left)}. {why}.")

    @property
    def seeds(self) -> list[int]:
        """Of the fresh weights that are measured, too."""
        return [self.chosen.seed + nth for nth in range(self.chosen.init_seeds if self.chosen.init else 0)]

    def _planned(self, seed: int) -> Context:
        """Of fresh weights that are not there yet. Plans may hold the pretrained model, and are not for them."""
        return replace(self.context, weights="init", seed=seed, plans={})

    def _of(self, context: Context) -> list[Measurement]:
        return [each for each in self.wanted if each.on_fresh or context.weights == "pretrained"]

    def measure(self) -> None:
        try:
            self._measure(self.context)
            if self.seeds:
                self._measure_fresh()
        except KeyboardInterrupt as interrupt:
            done = self.found.get("pretrained", {})
            if not self.keep_interrupted or any(
                each.needed and each.name not in done for each in self.wanted
            ):
                raise
            for each in self.wanted:
                if each.name not in done:
                    self._leave_out(each.name, each.subject, interrupt)
            if self.seeds and not self.found.get("init"):
                self._leave_out("init", "Fresh weights were", interrupt)

    def _measure(self, context: Context) -> None:
        found = self.found.setdefault(context.weights, {})
        reading = {each.name: each.reader(context) for each in self._of(context)}
        context = replace(
            context, found=found, readers={k: v for k, v in reading.items() if v is not None},
            patterns=FirstPatterns(context.structure, context.batches),
        )  # fmt: skip
        if context.weights == "pretrained":
            self._read_plain(context)
        for each in self._of(context):
            found[each.name] = self._one(each, replace(context, before=found.get(each.name)))

    def _read_plain(self, context: Context) -> None:
        """What the plain model does on the data, for interventions that go by it."""
        settings: Any = self.chosen
        asked = [each for variant in settings.asked() for each in variant.interventions]
        engine.prepare(
            context.structure, context.batches.of(context.numbers), asked,
            lambda sums: self.world.gather(sums, what="plain readings"),
        )  # fmt: skip

    # ---- fresh weights

    def _measure_fresh(self) -> None:
        """One seed after the other, each when nothing holds the weights before it any longer."""
        try:
            self._refuse_two()
        except RcProbeError as error:
            self._leave_out("init", "Fresh weights were", error)
            return
        print_of = blueprint(self.loaded)
        if not self.held:
            self._release()
        for seed in self.seeds:
            try:
                context = self._fresh(print_of, seed)
            except Exception as error:  # output projections that start at zero, no memory for them
                if not _others_go_on(error):
                    raise
                self._leave_out("init", "Fresh weights were", error)
                return
            self._measure(context)
            del context

    def _refuse_two(self) -> None:
        size = weight_bytes(self.loaded.model)
        if self.held and 2 * size > BOTH:
            what = f"the model that you hold stays in memory, and two of {size / 2**30:.1f} GiB are over {BOTH >> 30} GiB"
            raise RcProbeError(what, todo="Give its name or its folder in place of the model")

    def _release(self) -> None:
        """From here on nothing of the run holds the pretrained model."""
        self.loaded = replace(self.loaded, model=None)
        self.context = replace(
            self.context, loaded=self.loaded, batches=self.context.batches.on(self.loaded), plans={}
        )
        free_memory()

    def _fresh(self, print_of: Blueprint, seed: int) -> Context:
        model = print_of.build(seed)
        loaded = replace(self.loaded, model=model)
        return replace(
            self._planned(seed), loaded=loaded, batches=self.context.batches.on(loaded), structure=self._structure(model)
        )  # fmt: skip

    # ---- one measurement

    def _one(self, each: Measurement, context: Context) -> Found:
        """What it found; one that cannot be done on this model is a note, and the others go on."""

        def attempt() -> Found:
            try:
                return each.run(context)
            except Exception as error:
                alone = each.shared and self.world.size > 1 and not isinstance(error, FailedTogetherError)
                needed = each.needed and context.weights == "pretrained"
                if alone or needed or not _others_go_on(error):
                    raise  # alone: the others wait for its numbers
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
        found = {each.name: self._facts(each) for each in MEASUREMENTS if each.has_findings}
        return {**self.entry, **found, "notes": self._all_notes()}

    def _entry(self, model: Any) -> dict[str, Any]:
        """What is known of the model before anything is measured."""
        return model_entry(self.loaded, model, self.structure, self.context.name)

    def _stack_notes(self) -> list[str]:
        """What of a model of several stacks was measured, and what was not."""
        others = [*self.loaded.others, *self.structure.others]
        notes = [f"Not measured: the stacks {', '.join(others)} (choose one by --stack)."] if others else []
        notes += [f"Not measured: {why}" for why in self.structure.refused if "block" in why]
        if (count := self.structure.streams) > 1:
            each = "the table `streams` has each by itself"
            notes.append(
                f"Its blocks hand on {count} streams side by side. The curves are of all of them together, a token's one after the other; {each}."
            )
        return [*notes, *filter(None, [mixer_note(self.structure)])]


def free_memory() -> None:
    """What nothing holds any longer, and what torch keeps of it."""
    gc.collect()
    torch.cuda.empty_cache()


def _others_go_on(error: Exception) -> bool:
    """Whether the measurements after one that raised this have their turn: not where another process ended the run."""
    if out_of_memory(error):
        free_memory()
    return not isinstance(error, ElsewhereError)


def _why(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, RcProbeError):
        return str(error)
    if out_of_memory(error):
        return "out of memory. Try a smaller --batch-size or --length"
    return f"{FAULT} ({type(error).__name__}: {reason(error)})"
