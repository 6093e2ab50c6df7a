"""Run an experiment seed by seed. What a seed measured is kept in its folder, so that no seed is done twice."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from rc_probe.api import environment
from rc_probe.hooks.errors import RcProbeError
from rc_probe.options import at_least
from rc_probe.results.files import plain
from rc_probe.results.json_file import given_path
from rc_probe.results.saving import write_files
from rc_probe.results.tables import Row

from . import experiment
from .protocol import SEED, Experiment, SeedRun
from .result import ExperimentResult
from .training import Trainer

MEASURED = "measured.json"  # in the folder of a seed, written when all of it is done
VERSION = 1  # of what the experiments measure: another one does not go on with what is there
Tables = dict[str, list[Row]]


def run(
    name: str,
    *,
    seeds: int | None = None,
    device: str | None = None,
    quick: bool = False,
    data: Any = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
    finished: Callable[[int], None] = lambda seed: None,
) -> ExperimentResult:
    """Run an experiment: train its models with each seed, measure them, and judge the claims.

    >>> rc_probe.experiments.run("sort", seeds=2, quick=True).claims                 # doctest: +SKIP

    Parameters
    ----------
    name: one of `rc_probe.experiments.NAMES`
    seeds: how many, from 0; None: as many as its sizes say
    device: cpu, cuda, cuda:1 …; None: what accelerate chooses
    quick: smaller sizes, for a first look
    data: of `memorize`: texts to memorize, as in `rc_probe.probe`
    out: a folder for the results, the models (`seed-0/…`), and what finished seeds measured; None keeps nothing
    resume: whether seeds that were finished in `out` with the same sizes are taken from there
    progress: called as progress(stage, done, total); finished: called with each seed that is done

    Returns an ExperimentResult; saved to `out` too. RcProbeError, one line, for what cannot be run.
    """
    started = time.monotonic()
    chosen = experiment(name)
    sizes = chosen.quick if quick else chosen.sizes
    count = sizes.seeds if seeds is None else seeds
    at_least("--seeds", count, 1)
    if data is not None and not chosen.reads_data:
        raise RcProbeError(f"{name} makes its own data", where="--data", todo="Leave it out")
    home = None if out is None else given_path(out, "--out")
    trainer = Trainer(device)
    kept_before = _Finished(home if resume else None, chosen, sizes, data, trainer)
    found: list[Tables] = []
    earlier = 0.0  # seconds that seeds took in runs before this one
    for seed in range(count):
        kept = kept_before.read(seed)
        if kept is None:
            _report_to(trainer, progress, f"seed {seed + 1} of {count}")
            folder, begun = None if home is None else _folder(home, seed), time.monotonic()
            tables: Tables = plain(chosen.measure(SeedRun(seed, sizes, trainer, folder, data)))
            if folder is not None:
                kept_before.write(folder, tables, time.monotonic() - begun)
        else:
            tables, seconds = kept
            earlier += seconds
        found.append(tables)
        finished(seed)
    settings = {
        "sizes": chosen.settings(sizes),
        "seeds": count,
        "quick": quick,
        "device": str(trainer.device),
        "data": None if data is None else str(data),
        "command": _command(name, count, sizes.seeds, quick, data, device),
    }
    told = {"name": name, "title": chosen.title, "source": chosen.source}
    spent = environment(earlier + time.monotonic() - started)
    result = ExperimentResult(told, settings, spent, _tables(chosen, found))
    if home is not None:
        result.save(home)
    return result


def _tables(chosen: Experiment[Any], found: list[Tables]) -> dict[str, pd.DataFrame]:
    """The claims, then the tables of all seeds together."""
    seeds = [
        {
            table.name: table.frame({SEED.name: seed, **row} for row in one.get(table.name, ()))
            for table in chosen.tables
        }
        for seed, one in enumerate(found)
    ]
    whole = {
        table.name: table.frame(
            {SEED.name: seed, **row} for seed, one in enumerate(found) for row in one.get(table.name, ())
        )
        for table in chosen.tables
    }
    return {"claims": chosen.judge(seeds), **whole}


def _report_to(trainer: Trainer, progress: Callable[[str, int, int], None] | None, stage: str) -> None:
    if progress is not None:
        trainer.report = lambda what, done, total: progress(f"{stage}: {what}", done, total)


def _folder(home: Path, seed: int) -> Path:
    return home / f"seed-{seed}"


class _Finished:
    """What seeds of the same experiment measured before, in the folders of `home`."""

    def __init__(
        self, home: Path | None, chosen: Experiment[Any], sizes: Any, data: Any, trainer: Trainer
    ) -> None:
        import torch

        self.home = home
        self.same = plain(
            {
                "experiment": chosen.name,
                "version": VERSION,
                "sizes": chosen.settings(sizes),
                "data": chosen.digest(sizes, data),
                "device": trainer.device.type,
                "torch": torch.__version__,
            }
        )

    def read(self, seed: int) -> tuple[Tables, float] | None:
        """The tables of a seed, and how many seconds they took; None where it is to be done."""
        if self.home is None:
            return None
        try:
            kept = json.loads((_folder(self.home, seed) / MEASURED).read_text("utf-8"))
            found: tuple[Tables, float] = kept["tables"], float(kept["seconds"])
            return found if kept["same"] == json.loads(json.dumps(self.same)) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, folder: Path, tables: Tables, seconds: float) -> None:
        kept = {"same": self.same, "seconds": round(seconds, 2), "tables": tables}
        write_files(folder, {MEASURED: json.dumps(kept, allow_nan=False)})


def _command(name: str, count: int, usual: int, quick: bool, data: Any, device: str | None) -> str:
    words = ["rc-probe", "experiment", name]
    words += ["--seeds", str(count)] if count != usual else []
    words += ["--quick"] if quick else []
    words += ["--data", data if isinstance(data, str) else "DATA-GIVEN-IN-PYTHON"] if data is not None else []
    words += ["--device", device] if device else []
    return shlex.join(words)
