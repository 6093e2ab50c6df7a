"""Several runs side by side: models, revisions, seeds, quantised or pruned versions, or checkpoints of a training."""

from __future__ import annotations

import datetime
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import rc_probe
from rc_probe.hooks.errors import RcProbeError
from rc_probe.measures import TABLES
from rc_probe.registry import PAPER, WHOLE
from rc_probe.results.curves import BULK, RESIDUAL, curves, curves_by_metric, headline, metrics_of
from rc_probe.results.files import as_json, tidy
from rc_probe.results.json_file import SCHEMA, reading
from rc_probe.results.like_for_like import aligned, unlike
from rc_probe.results.protocols import Failure, Run
from rc_probe.results.saved import Saved
from rc_probe.results.tables import CLAIMS, COMPARED, DIFFED, FRAMES, RUN, STEP, Column, Row, page
from rc_probe.results.tables import Table as Declared
from rc_probe.results.words import name_of

from .result import ProbeResult

MOST_NAMES = 4  # in a title
DEPTH = Column("depth", "float64", "layer / blocks, 0 to 1")
TRAINED = Column("training_step", "int64", STEP.meaning)  # where a table has steps of its own


def _trained(name: str) -> Column:
    return TRAINED if STEP.name in TABLES[name].names else STEP


AS_THEY_ARE = (
    "ablations", "embeddings", "importance", "drops", "masks", "norms", "phase", "attention", "attention_sinks",
    "attention_masks",
)  # fmt: skip
STACKED = {  # the runs' tables of these names below each other
    name: Declared(
        name, f"The tables {name} of the runs", (RUN, _trained(name), *TABLES[name].columns, *more)
    )
    for name, more in {"residuals": (DEPTH,), **dict.fromkeys(AS_THEY_ARE, ())}.items()
}
CHANGING = ("first", "last", "lowest")  # key numbers that are compared with the first run's
ABLATION = ["component", "layer", "head"]  # what says which ablation a row is about


@dataclass(eq=False)
class Comparison(Saved):
    """Runs by their names, in the order in which they are shown.

    Tables (`tables`): `runs` (one row per run: its key numbers), `residuals` and those of AS_THEY_ARE
    (as in a run, with the columns run, and step or depth), `changes` (against the first run, where depths agree and it is no training),
    `differences` (settings that keep curves from being compared), `failures`.
    """

    runs: list[Run]
    failures: list[Failure] = field(default_factory=list)
    title: str = "comparison"
    command: str | None = None
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )

    @cached_property
    def differences(self) -> dict[str, dict[str, str]]:
        """What was not measured alike: by setting and run. Empty where all curves can be compared."""
        found = unlike([run.result.settings for run in self.runs])
        names = [run.name for run in self.runs]
        return {what: dict(zip(names, values, strict=True)) for what, values in found.items()}

    @property
    def source(self) -> str | None:
        """The files that it was loaded from; None where there is none."""
        return ", ".join(str(run.result.source) for run in self.runs if run.result.source) or None

    @property
    def metric(self) -> str:
        """The metric that all runs are compared by."""
        measured = [metrics_of(run.result) & {RESIDUAL, BULK} for run in self.runs]
        some = [metrics for metrics in measured if metrics]
        return headline(set.intersection(*some) if some else set())

    @property
    def training(self) -> bool:
        """Whether the runs are checkpoints of one model, with their steps."""
        depths = {run.result.model.get("blocks") for run in self.runs}
        return len(self.runs) > 1 and len(depths) == 1 and all(run.step is not None for run in self.runs)

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        tables = {
            "runs": COMPARED["runs"].frame(
                _with_changes([_key_numbers(run, self.metric) for run in self.runs])
            ),
            "residuals": self._stacked("residuals"),
            "changes": COMPARED["changes"].frame(() if self.training else self._changes()),
            **{name: self._stacked(name) for name in AS_THEY_ARE},
            "differences": COMPARED["differences"].frame(
                {"setting": what, "run": name, "value": value}
                for what, values in self.differences.items()
                for name, value in values.items()
            ),
            "failures": COMPARED["failures"].frame(map(vars, self.failures)),
        }
        if not self.training:
            tables["runs"] = tables["runs"].drop(columns="step")
        return {name: tidy(name, frame) for name, frame in tables.items() if len(frame)}

    def _stacked(self, name: str) -> pd.DataFrame:
        """The runs' tables of that name below each other, with the columns run, and step or depth (0 to 1)."""
        frames = []
        for run in self.runs:
            frame = run.result.tables.get(name)
            if frame is None or frame.empty:
                continue
            frame = frame.assign(run=run.name)
            if self.training:
                frame = frame.assign(**{_trained(name).name: run.step})
            if name == "residuals":
                frame = frame.assign(depth=self._depths(run, map(int, frame["layer"])))
            frames.append(frame[[column for column in STACKED[name].names if column in frame]])
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def _depths(self, run: Run, layers: Iterable[int]) -> list[float]:
        """From 0 to 1; of a part of the first run's model that of the same blocks there."""
        first, found = self.runs[0].result, [*layers]
        blocks = run.result.model.get("blocks") or max(*found, 1)
        whole = first.model.get("blocks") or 0
        pairs = aligned(run.result, first) if whole > blocks else None
        if pairs is None:
            return [layer / blocks for layer in found]
        places = dict(pairs)
        return [places[layer] / whole for layer in found]

    def _changes(self) -> Iterator[Row]:
        """Each metric of the whole model, less the first run's at the layer that corresponds, where that is known."""
        key = ("pretrained", WHOLE)
        first, *others = ((run, curves_by_metric(run.result)) for run in self.runs)
        for run, found in others:
            pairs = aligned(run.result, first[0].result)
            for metric in found if pairs else ():
                mine, its = found[metric].get(key), first[1].get(metric, {}).get(key)
                if mine is None or its is None:
                    continue
                now, before = ({layer: i for i, layer in enumerate(one.layers)} for one in (mine, its))
                for layer, other in pairs or ():
                    if layer in now and other in before:
                        i, j = now[layer], before[other]
                        floors = np.nan_to_num([mine.floors[i], its.floors[j]])
                        yield {
                            "run": run.name, "metric": metric, "layer": layer, "value": mine.means[i],
                            "baseline": its.means[j], "change": mine.means[i] - its.means[j],
                            "floor": float(floors.sum()),
                        }  # fmt: skip

    def common_ablations(self) -> pd.DataFrame:
        """The residual at the last layer under each ablation that all runs have: one row per run, one column per ablation."""
        stacked = self.tables.get("ablations")
        if stacked is None:
            return pd.DataFrame()
        rows = stacked[stacked["metric"] == self.metric].copy()
        rows["ablation"] = [_ablation(row) for row in rows[ABLATION].to_dict("records")]
        wide = rows.pivot_table(index="run", columns="ablation", values="value", sort=False, dropna=False)
        order = [run.name for run in self.runs if run.name in wide.index]
        return wide.loc[order].dropna(axis="columns") if len(order) == len(self.runs) else pd.DataFrame()

    def to_json(self, files: Mapping[str, str] | None = None) -> str:
        entries = {
            "schema": SCHEMA,
            "kind": "comparison",
            "title": self.title,
            "settings": {"command": self.command, "like_for_like": not self.differences},
            "environment": {"rc_probe": rc_probe.__version__, "date": self.date},
        }
        return as_json(entries, self.tables, files)

    def _render(self) -> str:
        from rc_probe.reports.pages.comparison import render

        return render(self)


def compare(*runs: str | os.PathLike[str] | ProbeResult, command: str | None = None) -> Comparison:
    """Compare results: folders that rc-probe wrote, their `results.json`, or ProbeResults.

    Runs of the same model get names that tell them apart. Raises RcProbeError for fewer than two, and for what
    cannot be read.
    """
    if len(runs) < 2:
        todo = "Give two or more folders that rc-probe wrote, or their results.json"
        raise RcProbeError(f"{len(runs)} runs cannot be compared", where="compare", todo=todo)
    results = [run if isinstance(run, ProbeResult) else ProbeResult.load(run) for run in runs]
    places = ["" if isinstance(run, ProbeResult) else _folder(Path(run)) for run in runs]
    names = distinct([name_of(result) for result in results], results, places)
    made = [Run(name, result) for name, result in zip(names, results, strict=True)]
    title = ", ".join(names) if len(names) <= MOST_NAMES else f"{len(names)} runs"
    comparison = Comparison(made, title=title, command=command)
    with reading(comparison.source):
        _ = comparison.tables, comparison.metric
    return comparison


def _folder(path: Path) -> str:
    return (path if path.is_dir() else path.parent).resolve().name


def distinct(names: Sequence[str], results: Sequence[ProbeResult], places: Sequence[str]) -> list[str]:
    """Names of which no two are the same: those that are get their revision, data type and folder, as needed."""
    asides = (
        [str(result.model.get("revision") or "")[:12] for result in results],
        [str(result.settings.get("dtype") or "") for result in results],
        list(places),
    )
    names = list(names)
    for aside in asides:
        count = Counter(names)
        same = {name for name in names if count[name] > 1}
        for name in same:
            here = [i for i, other in enumerate(names) if other == name]
            if len({aside[i] for i in here}) > 1:
                for i in here:
                    names[i] = f"{name} ({aside[i]})" if aside[i] else name
    seen: Counter[str] = Counter()
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = f"{name} #{seen[name]}" if seen[name] > 1 else name
    return names


def _key_numbers(run: Run, metric: str) -> dict[str, Any]:
    """A row of the table `runs`."""
    result, verdict = run.result, run.result.verdict
    curve = curves(result, metric).get(("pretrained", WHOLE))
    ends: dict[str, Any] = {"first": None, "last": None, "lowest": None, "lowest_layer": None, "level": None}
    if curve is not None and verdict.get("variant") == WHOLE:
        ends = {
            "first": curve.means[0], "last": curve.means[-1], "lowest": verdict["lowest"],
            "lowest_layer": verdict["lowest_layer"], "level": verdict["level"],
        }  # fmt: skip
    model, settings = result.model, result.settings
    return {
        "run": run.name, "step": run.step, **ends, "model": model.get("id"), "revision": model.get("revision"),
        "class": model.get("class"), "blocks": model.get("blocks"), "parameters": model.get("parameters"),
        "dtype": settings.get("dtype"), "seed": settings.get("seed"), "samples": settings.get("samples"),
        "tokens": settings.get("tokens"),
    }  # fmt: skip


def _with_changes(rows: list[Row]) -> list[Row]:
    """Rows of the table `runs` with how far their numbers are from the first's; the first has none."""
    for place, row in enumerate(rows):
        for name in CHANGING:
            known = place and row[name] is not None and rows[0][name] is not None
            row[f"{name}_change"] = row[name] - rows[0][name] if known else None
    return rows


def _ablation(row: Mapping[Hashable, Any]) -> str:
    """An ablation's name as it is written: `mlp@7`, `head@2:5`; the paper's variants by theirs."""
    component, layer, head = (row[key] for key in ABLATION)
    head = f":{head}" if isinstance(head, str) and head else ""
    return component if component in PAPER else f"{component}@{layer}{head}"


def tables_page() -> str:
    """docs/tables.md."""
    compared = [*COMPARED.values(), *STACKED.values()]
    frames = {"Frames from Python, and `rc-probe lm-eval`": FRAMES.values()}
    two = {"A difference of two models": [DIFFED["differences"]], "An experiment": CLAIMS.values()}
    return page({"A run": TABLES.values(), "A comparison": compared, **two, **frames})


if __name__ == "__main__":
    print(tables_page(), end="")
