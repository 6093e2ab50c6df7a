"""Embeddings: how alike those of different samples are, how many directions they use, and which layer's find best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rc_probe.measures.measurement import Found, Measurement
from rc_probe.options import Options, option
from rc_probe.results.protocols import Result
from rc_probe.results.tables import METRIC, Column, Table

if TYPE_CHECKING:
    from rc_probe.data.samples import Samples
    from rc_probe.measures.context import Context
    from rc_probe.models.load import Loaded

    from .measured import Plan
    from .pooled import PooledReader

LAYER = Column(
    "layer", "int64",
    "which tokens are pooled: 0 those that enter block 1, l those that leave block l; the last one is the model's own embedding, behind its final norm",
)  # fmt: skip
EMBEDDINGS = Table("embeddings", "Embeddings by layer", (
    LAYER, METRIC,
    Column("value", "float64", "mean over pairs, over samples that look for another, or one number of all samples"),
    Column("std", "float64", "of cosines: standard deviation over pairs (ddof 1)"),
    Column("low", "float64", "lower end of the 95 % interval; empty where none is known, and for fewer than 8 samples"),
    Column("high", "float64", "upper end of it"),
    Column("most", "float64", "what so many samples can reach, of IsoScore and RankMe"),
    Column("count", "int64", "how many samples, or pairs of samples that look for each other"),
))  # fmt: skip
COMPONENTS = Table("embedding_components", "Variance of embeddings by principal component", (
    LAYER,
    Column("component", "int64", "from 1, the largest first"),
    Column("share", "float64", "its share of the variance"),
))  # fmt: skip
COSINES = Table("embedding_cosines", "Cosines of random pairs of the model's own embeddings", (
    Column("low", "float64", "lower edge of the bin"), Column("high", "float64", "upper edge of it"),
    Column("pairs", "int64", "pairs of different samples whose cosine is in it"),
))  # fmt: skip
HELP = (
    "How embeddings of whole samples lie, and which layer's find best. (default: of models whose embeddings are what they "
    "are for; --embeddings asks for it of others)"
)


@dataclass(frozen=True)
class EmbeddingOptions(Options):
    """Whether embeddings are measured. None: of models that pool."""

    embeddings: bool | None = option(None, HELP)


class Embeddings(Measurement):
    """Reads the plain passes of the curves; where the task is to find the other half of a text, one more over the halves."""

    name, subject = "embeddings", "Embeddings were"
    options = EmbeddingOptions
    tables = (EMBEDDINGS, COMPONENTS, COSINES)
    shared = True

    def wanted(self, settings: Any) -> bool:
        return settings.embeddings is not False

    def plan(self, loaded: Loaded, samples: Samples, settings: Any) -> Plan | None:
        from .measured import plan_embeddings

        return plan_embeddings(loaded, samples, settings)

    def reader(self, context: Context) -> PooledReader | None:
        from .measured import curve_reader

        return curve_reader(context, context.plans.get(self.name))

    def run(self, context: Context) -> Found:
        plan = context.plans[self.name]
        if plan is None:
            return Found()
        from .measured import measure_embeddings

        return measure_embeddings(context, plan)

    def findings(self, result: Result) -> dict[str, Any] | None:
        from rc_probe.results.findings.embedding_words import judge_embeddings

        return judge_embeddings(result)
