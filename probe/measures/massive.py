"""Massive tokens: which are longer than the others by far, from which layer to which, and whether the bound matters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rc_probe.registry import MASSIVE
from rc_probe.results.protocols import Result
from rc_probe.results.tables import LAYER, Column, Table

from .measurement import Found, Measurement

if TYPE_CHECKING:
    from .context import Context
    from .massive_reader import MassiveReader

MOST = 20  # rows of a layer
TOKENS = Table("massive", "Massive tokens by layer", (
    LAYER,
    Column("position", "int64", "among the real tokens of its sample, from 1"),
    Column("token", "str", "its text; empty where the model does not read tokens"),
    Column("samples", "int64", "in how many samples this token is massive at this position"),
    Column("norm_over_median", "float64", "its norm over the median norm of its sample, mean over these",
           "× median norm"),
    Column("coordinate", "int64", "its largest coordinate (index from 0, the most frequent one)"),
    Column("coordinate_share", "float64", "that coordinate's share of the squared norm, mean over the samples"),
))  # fmt: skip
LEVELS = Table("massive_levels", "The residual of the bulk by what counts as massive", (
    Column("massive", "int64", "tokens of norm over so many times the median are left out"),
    LAYER,
    Column("mean", "float64", "relative residual of the others, mean over samples"),
    Column("floor", "float64", "rounding floor: up to here the number is noise"),
))  # fmt: skip
FACTORS = (3, MASSIVE, 10)


class Massive(Measurement):
    """Reads the plain passes of the curves: the largest norms, and the residual of the bulk under other bounds."""

    name, subject = "massive", "Massive tokens were"
    tables = (TOKENS, LEVELS)
    on_mixed = shared = True

    def wanted(self, settings: Any) -> bool:
        return "residual_bulk" in settings.measured

    def reader(self, context: Context) -> MassiveReader:
        from .massive_reader import MassiveReader

        return MassiveReader(FACTORS)

    def run(self, context: Context) -> Found:
        from .massive_reader import MassiveReader

        mine: MassiveReader = context.readers[self.name]
        whole = MassiveReader.merged(context.world.gather(mine.pack(), what="massive tokens"))
        words = context.loaded.processor if context.loaded.modality == "text" else None
        rows = whole.rows(MOST, lambda token: "" if words is None or token < 0 else words.decode([token]))
        return Found({"massive": rows, "massive_levels": whole.level_rows() if rows else []})

    def findings(self, result: Result) -> dict[str, Any] | None:
        from rc_probe.results.findings.massive_words import judge_massive

        return judge_massive(result)
