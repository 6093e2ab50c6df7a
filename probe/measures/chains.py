"""Chained attention: how fast products of attention patterns along a path forget which token is which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rc_probe.hooks.errors import RcProbeError
from rc_probe.options import Options, option
from rc_probe.results.tables import METRIC, Column, Table

from .measurement import Found, Measurement

if TYPE_CHECKING:
    from .context import Context

CHAINS = Table("chains", "Products of attention patterns by length", (
    Column("length", "int64", "patterns in the product"), METRIC,
    Column("mean", "float64", "mean over paths and samples"),
    Column("std", "float64", "standard deviation over them (ddof 1)"),
    Column("median", "float64", "median over them"),
    Column("low", "float64", "lower quartile", "lower quartile"),
    Column("high", "float64", "upper quartile", "upper quartile"),
    Column("count", "int64", "how many products"),
))  # fmt: skip


@dataclass(frozen=True)
class ChainOptions(Options):
    """Whether to measure them. None: with the paths."""

    chains: bool | None = option(
        None, "Products of attention patterns along paths. (default: with --paths)", panel="Paths"
    )


class Chains(Measurement):
    """Paths drawn at random, on the first samples."""

    name, subject = "chains", "Chained attention was"
    options = ChainOptions
    tables = (CHAINS,)

    def wanted(self, settings: Any) -> bool:
        return bool(settings.paths if settings.chains is None else settings.chains)

    def run(self, context: Context) -> Found:
        from .chained_attention import affordable, chained_products, said

        context.advance("chained attention")
        chosen = affordable(context.shape, cut=context.loaded.modality == "text")
        if chosen is None:
            what = f"its products of {context.shape.tokens} tokens take more than is allowed for"
            raise RcProbeError(what, where=context.name, todo="Give a smaller --length")
        rows = chained_products(
            context.structure, context.batches, chosen, seed=context.settings.seed, read=context.patterns
        )
        return Found({"chains": rows}, said(chosen))
