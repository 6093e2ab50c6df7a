"""Heads: the spectrum of each head's query-key and output-value circuit, beside the rank of its scores on the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rc_probe.measures.measurement import Found, Measurement
from rc_probe.options import Options, option
from rc_probe.results.protocols import Result
from rc_probe.results.tables import METRIC, Column, Row, Table

if TYPE_CHECKING:
    from torch import Tensor

    from rc_probe.hooks.heads.forms import Circuit, Heads
    from rc_probe.measures.context import Context

HEADS = Table("heads", "Ranks of attention heads", (
    Column("block", "int64", "number of the block, from 1"),
    Column("head", "int64", "number of the head, from 1; empty for a mean over the heads of the block"),
    Column("circuit", "str", "`qk`: which token is looked at; `ov`: what is written of it"),
    METRIC,
    Column("value", "float64", "the number; of `logits_r90` the mean over samples"),
))  # fmt: skip
PAIR = "pair_"  # how metrics begin that are the share of the energy of one pair of rotary features, the fastest first
SAMPLES = 8
HELP = "The ranks of every head: spectra of its query-key and output-value circuits, and of its scores on the data."


@dataclass(frozen=True)
class HeadOptions(Options):
    """Whether heads are measured, and on how many samples their scores."""

    heads: bool = option(False, HELP, flags=("--heads",))
    head_samples: int = option(SAMPLES, "Samples that the scores of heads are read on.", least=1)


class HeadRanks(Measurement):
    """A few passes of a small example, and one plain pass of the first samples."""

    name, subject = "heads", "The ranks of heads were"
    options = HeadOptions
    tables = (HEADS,)
    shared = True

    def wanted(self, settings: Any) -> bool:
        return bool(settings.heads)

    def run(self, context: Context) -> Found:
        from rc_probe.hooks.errors import RcProbeError
        from rc_probe.hooks.heads.read import read_heads

        context.advance("reading heads")
        heads, refused = read_heads(context.structure)
        if not heads:
            why = next(iter(refused.values()), "no block attends")
            raise RcProbeError(why)
        longest = context.shape.tokens
        ranks = _scores(context, heads, context.settings.head_samples)
        rows = [row for index in sorted(heads) for row in rows_of(heads[index], longest, ranks.get(index))]
        notes = _notes(heads, refused, {index: "" for index in heads if index not in ranks})
        return Found({"heads": rows}, notes, _facts(context, heads, longest))

    def entries(self, settings: Any, samples: int) -> dict[str, Any]:
        return {
            "heads": settings.heads,
            **({"head_samples": min(settings.head_samples, samples)} if settings.heads else {}),
        }

    def findings(self, result: Result) -> dict[str, Any] | None:
        from rc_probe.results.findings.heads.rank_words import judge_heads

        return judge_heads(result)


def rows_of(heads: Heads, longest: int, ranks: Tensor | None) -> list[Row]:
    """Of one block. longest: tokens of the longest sample; ranks: (heads,) of the scores on the data."""
    import torch

    from rc_probe.metrics.spectra import shape_of

    found = {"qk": _metrics(heads.qk)}
    if heads.rotary is not None and heads.energy is not None:
        slow = heads.rotary.angles * longest < 2 * torch.pi
        found["qk"]["slow_energy"] = heads.energy[:, slow].sum(-1)
    if ranks is not None:
        found["qk"]["logits_r90"] = ranks
    found["qk"]["bottleneck"] = torch.full((heads.count,), float(heads.width < longest))
    if heads.ov is not None:
        found["ov"] = _metrics(heads.ov)
    for circuit, form in (("qk", heads.qk), ("ov", heads.ov)):
        if form is not None:
            found[circuit] |= shape_of(form.across, form.norms, form.dim)
    block = heads.block.index + 1
    rows = [
        {"block": block, "head": head + 1, "circuit": circuit, "metric": name, "value": float(values[head])}
        for head in range(heads.count) for circuit, metrics in found.items() for name, values in metrics.items()
    ]  # fmt: skip
    pairs = [] if heads.energy is None else heads.energy.mean(0).tolist()
    return rows + [
        {"block": block, "head": None, "circuit": "qk", "metric": f"{PAIR}{number}", "value": share}
        for number, share in enumerate(pairs, 1)
    ]


def _metrics(circuit: Circuit) -> dict[str, Tensor]:
    import torch

    from rc_probe.hooks.one_thread import small_matrices
    from rc_probe.metrics.spectra import spectrum

    core = circuit.core
    with small_matrices(core):
        values = torch.linalg.svdvals(core)
    return spectrum(values, core.shape[-1], circuit.dim)


def _scores(context: Context, heads: dict[int, Heads], samples: int) -> dict[int, Tensor]:
    """Of each block (heads,): the mean rank of the row-centred scores, over the first samples of all processes."""
    import torch

    from rc_probe import engine
    from rc_probe.hooks.heads.operands import watch_operands

    from .score_ranks import RankReader

    reader = RankReader(samples)
    numbers = [n for n in context.numbers if n * context.settings.batch_size < samples]
    engine.run(
        context.structure, context.batches.of(numbers), {}, [reader],
        base=watch_operands(heads.values(), reader.operands), advance=lambda name: context.advance("ranks of scores"),
    )  # fmt: skip
    seen = [part for own in context.world.gather(reader.seen, what="ranks of scores") for part in own]
    ordered = sorted(seen, key=lambda part: part[0])
    blocks = set.intersection(*(set(found) for _, found in ordered)) if ordered else set()
    return {block: torch.cat([found[block] for _, found in ordered]).double().mean(0) for block in blocks}


def _notes(heads: dict[int, Heads], refused: dict[int, str], unranked: dict[int, str]) -> list[str]:
    notes = [f"The heads of blocks {blocks} were not read: {why}." for why, blocks in _by_text(refused)]
    without = {index: each.no_ov for index, each in heads.items() if each.no_ov}
    notes += [
        f"The output-value circuits of blocks {blocks} were not read: {why}."
        for why, blocks in _by_text(without)
    ]
    left = {index: text for index, each in heads.items() for text in each.left_out}
    notes += [f"Not included in the forms of blocks {blocks}: {what}." for what, blocks in _by_text(left)]
    notes += [
        f"The scores of blocks {blocks} have no rank on the data: they are not those of all tokens of a sample."
        for _, blocks in _by_text(unranked)
    ]
    turning = {index: "turn" for index, each in heads.items() if each.turns}
    return notes + [
        f"Queries and keys of blocks {blocks} turn with their positions: their forms are those of equal positions."
        for _, blocks in _by_text(turning)
    ]


def _by_text(texts: dict[int, str]) -> list[tuple[str, str]]:
    from rc_probe.interventions.intervention import span

    return [
        (text, span(tuple(i + 1 for i, each in texts.items() if each == text)))
        for text in dict.fromkeys(texts.values())
    ]


def _facts(context: Context, heads: dict[int, Heads], longest: int) -> dict[str, Any]:
    first = next(iter(heads.values()))
    return {
        "heads": sum(each.count for each in heads.values()), "width": first.width, "dim": first.qk.dim,
        "context": longest, "samples": min(context.settings.head_samples, len(context.samples.items)),
        "turning": any(each.turns for each in heads.values()),
    }  # fmt: skip
