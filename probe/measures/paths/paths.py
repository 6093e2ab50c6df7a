"""Paths: what paths of each length carry, and what the model's own head makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rc_probe.hooks.errors import RcProbeError
from rc_probe.measures.measurement import Found, Measurement
from rc_probe.options import Options, option
from rc_probe.results.protocols import Result
from rc_probe.results.tables import METRIC, SPREAD, Column, Table

if TYPE_CHECKING:
    from rc_probe.data.samples import Samples
    from rc_probe.measures.context import Context
    from rc_probe.models.load import Loaded

    from .last_streams import LastStreams

_COUNT = Column("count", "str", "how many paths have this length, in decimal: it may be beyond 2⁶³")
PATHS = Table("paths", "What paths of each length do", (
    Column("length", "int64", "heads on the path; empty where a row is about no length"),
    _COUNT,
    Column("estimator", "str", "`exact`, `sampled`, `live`; `full` and `baseline` of the reference rows"),
    Column("drawn", "int64", "paths drawn at each length for an estimate; empty where none are"),
    Column("scope", "str", "`alone`, `up_to` or `all_but` this length; `none`: biases without a path; `full`, `baseline`"),
    METRIC,
    Column("mean", "float64", "over samples where exact, over estimates else"),
    *SPREAD,
))  # fmt: skip
PATH_SOURCES = Table("path_sources", "By source, all lengths together", (
    Column("source", "str", "`tokens`, `positions` or `bias`"), METRIC,
    Column("mean", "float64", "mean over the first 8 samples of the run"), *SPREAD,
))  # fmt: skip
PATH_COUNTS = Table("path_counts", "How many paths of each length there are, beside well-known architectures", (
    Column("model", "str", "the model at hand, then architectures by name"),
    Column("length", "int64", "heads on the path"),
    _COUNT,
    Column("share", "float64", "their share of all paths"),
))  # fmt: skip
PATHS_HELP = (
    "How much paths of each length do, exactly. With numbers, '--paths 5 20', also sampled and live: so many paths drawn "
    "at each length."
)
PANEL, REPEATS = "Paths", 5


def _read_draws(text: str | None) -> tuple[int, ...]:
    """The numbers behind `--paths`, separated by spaces."""
    try:
        return tuple(int(number) for number in (text or "").split())
    except ValueError:
        todo = "Write --paths, or --paths 5 20"
        raise RcProbeError(f"{text!r} are no numbers of paths", where="--paths", todo=todo) from None


@dataclass(frozen=True)
class PathOptions(Options):
    """What is measured of paths."""

    paths: bool = option(True, PATHS_HELP, panel=PANEL, flags=("--paths/--no-paths",))
    path_draws: tuple[int, ...] = option(  # paths drawn at each length for an estimate; none: the exact numbers alone
        (), typed=str | None, read=_read_draws, flags=("--path-draws",), hidden=True, panel=PANEL,
        words=lambda numbers, chosen: ["--paths", *map(str, numbers)] if chosen.paths else [],
    )  # fmt: skip
    repeats: int = option(REPEATS, "Estimates of each, for the intervals.", panel=PANEL, least=2)
    path_samples: int | None = option(
        None, "Samples that paths are measured on. (default: 16, fewer of long texts)", panel=PANEL, least=1
    )
    max_length: int | None = option(
        None, "Group all longer paths. (default: 8 if over 12 blocks)", panel=PANEL, least=0
    )
    count_mlp: bool = option(
        False, "An MLP is a hop of a path, as a head is.", panel=PANEL, flags=("--count-mlp",)
    )

    def check(self) -> None:
        super().check()
        if self.repeats != REPEATS and not self.path_draws and self.paths:
            todo = "Say how many paths are drawn: --paths 20"
            raise RcProbeError("it changes nothing: no paths are drawn", where="--repeats", todo=todo)
        if self.path_draws and min(self.path_draws) < 1:
            raise RcProbeError(
                f"{min(self.path_draws)} is too small", where="--paths", todo="Give at least 1"
            )


class Paths(Measurement):
    """The exact numbers, on the first samples; estimates where paths are drawn."""

    name, subject = "paths", "Paths were"
    options = PathOptions
    tables = (PATHS, PATH_SOURCES, PATH_COUNTS)
    shared = True

    def wanted(self, settings: Any) -> bool:
        return bool(settings.paths)

    def plan(self, loaded: Loaded, samples: Samples, settings: Any) -> Any:
        from rc_probe.paths.tables import plan_paths

        return plan_paths(loaded, samples, settings)  # labels that cannot be meant end the run here

    def reader(self, context: Context) -> LastStreams | None:
        from .last_streams import kept_streams

        plan = context.plans[self.name]
        return kept_streams(context.structure, len(plan.scored.items))

    def run(self, context: Context) -> Found:
        from rc_probe.paths.tables import measure_paths

        context.advance("paths: exact")
        streams: LastStreams | None = context.readers.get(self.name)
        found = measure_paths(
            context.loaded, context.structure, context.plans[self.name], context.settings, context.name,
            lambda stage: context.advance(f"paths: {stage}"), context.world, context.shape,
            streams.of if streams else None,
        )  # fmt: skip
        longest = context.structure.depth * (2 if context.settings.count_mlp else 1)
        if (given := context.settings.max_length) is not None and given >= longest:
            found.notes.append(
                f"--max-length {given} grouped nothing: no path is longer than {longest}. Tokens of a text: --length."
            )
        return Found(found.tables, found.notes, found.facts)

    def findings(self, result: Result) -> dict[str, Any] | None:
        from rc_probe.results.path_verdict import judge_paths

        return judge_paths(result)
