"""The model's own attention: what each head does, which tokens are sinks, what the mask lets through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rc_probe.hooks.errors import RcProbeError
from rc_probe.measures.measurement import Found, Measurement
from rc_probe.options import Options, option
from rc_probe.results.protocols import Result
from rc_probe.results.tables import METRIC, Column, Table

if TYPE_CHECKING:
    from rc_probe.measures.context import Context

COMPONENT = Column("component", "str", "`attention`, or `cross` where it attends to another stream")
BLOCK = Column("block", "int64", "number of the block, from 1")
ATTENTION = Table("attention", "Attention by block and head", (
    COMPONENT, BLOCK,
    Column("head", "Int64", "number of the head, from 1; empty for the mean over the heads"), METRIC,
    Column("mean", "float64", "mean over the samples that were read"),
    Column("std", "float64", "standard deviation over them (ddof 1); empty for one sample"),
    Column("count", "int64", "how many samples"),
))  # fmt: skip
SINKS = Table("attention_sinks", "Tokens that get over .3 of a head's attention", (
    COMPONENT, BLOCK, Column("head", "int64", "number of the head, from 1"),
    Column("position", "int64", "of the token that is attended to, among the real tokens of its sample, from 1"),
    Column("token", "str", "its text; empty where the model does not read tokens"),
    Column("samples", "int64", "in how many samples this token is one at this position"),
    Column("attention", "float64", "mean attention that the other queries give it, mean over these"),
))  # fmt: skip
MASKS = Table("attention_masks", "What the mask lets through, block by block", (
    BLOCK, Column("tokens", "int64", "of the longest sample that was read: edges, centers, radius and self-loops are its"),
    Column("edges", "float64", "share of pairs of a query and a key that the mask allows"),
    Column("centers", "int64", "tokens that reach all others, through others or at once"),
    Column("radius", "Int64", "the fewest blocks that a center needs for it; empty without centers"),
    Column("self_loops", "bool", "whether each token sees itself", "self-loops"),
    Column("least_weight", "float64", "ε, the smallest weight on an edge of the head-averaged pattern", "ε"),
    Column("averaged", "float64", "Dobrushin coefficient of the head-averaged pattern"),
    Column("product", "float64", "that of the product of these patterns from block 1 to here: the tight certificate"),
    Column("paths", "float64", "what that of no product of one head a block from block 1 to here can exceed", "any path"),
    Column("bound", "float64", "what the theorem of Wu et al. says that the product cannot exceed", "theorem"),
    Column("vacuous", "boolean", "whether that is no news: over .99"),
    Column("reason", "str", "why it is no news", "why vacuous"),
))  # fmt: skip


@dataclass(frozen=True)
class AttentionOptions(Options):
    """Whether to measure it."""

    attention: bool = option(True, "The model's own attention: entropy, sinks, masks, head by head.")


class Attention(Measurement):
    """The patterns of the first samples, four at most."""

    name, subject = "attention", "The model's own attention was"
    options = AttentionOptions
    tables = (ATTENTION, SINKS, MASKS)

    def wanted(self, settings: Any) -> bool:
        return bool(settings.attention)

    def run(self, context: Context) -> Found:
        from .affordable import affordable, said
        from .reading import Reading

        read = context.patterns
        assert read is not None
        kinds = {branch.kind for block in context.structure.blocks for branch in block.branches}
        if not kinds & {"attention", "cross"}:
            return Found(notes=["The model has no attention, so that none was measured."])
        context.advance("its own attention")
        chosen = affordable(context.shape, read.heads, cut=context.loaded.modality == "text")
        if chosen is None:
            what = f"its patterns of {context.shape.tokens} tokens take more than is allowed for"
            raise RcProbeError(what, where=context.name, todo="Give a smaller --length")
        found = Reading(chosen.cubes)
        for sample in read.samples(chosen.samples, chosen.tokens):
            found.add(sample)
        words = context.loaded.processor if context.loaded.modality == "text" else None
        sinks = found.sink_rows(lambda token: "" if words is None or token < 0 else words.decode([token]))
        tables = {
            "attention": found.head_rows(),
            "attention_sinks": sinks,
            "attention_masks": found.mask_rows(),
        }
        return Found(tables, [*said(chosen), *found.notes()], facts={"samples": found.samples})

    def findings(self, result: Result) -> dict[str, Any] | None:
        from rc_probe.results.findings.attention_words import judge_attention

        return judge_attention(result)
