"""Heads truncated, alone and together: rows of the tables `truncation` and `truncation_curves`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rc_probe import engine
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.heads.forms import Heads
from rc_probe.hooks.heads.read import read_heads
from rc_probe.hooks.structure.structure import Structure
from rc_probe.interventions.intervention import Intervention, Variant
from rc_probe.interventions.paper import paper_variants
from rc_probe.interventions.rank import METHODS, Ranked
from rc_probe.measures.importance.scored import Plan, Scores, score
from rc_probe.measures.measurement import Found
from rc_probe.measures.variant_passes import CurveReader
from rc_probe.metrics.layer_curves import gather_curves
from rc_probe.registry import WHOLE
from rc_probe.results.findings.importance_words import CRITERIA
from rc_probe.results.tables import Row

from .neighbours import NeighbourReader
from .row_divergence import DivergenceReader

if TYPE_CHECKING:
    from rc_probe.data.batches import Batch
    from rc_probe.measures.context import Context

HEAD_METHOD = "data"  # of single heads
CURVE_METHODS = ("weights", "data")
BY_LAYER = ("residual_bulk", "residual_frobenius")
SMALLEST = "smallest"
SAN = "SAN"


@dataclass(frozen=True)
class Cell:
    """One pass. block, head: from 1, None for all."""

    intervention: Ranked
    block: int | None = None
    head: int | None = None

    @property
    def name(self) -> str:
        return self.intervention.label

    @property
    def place(self) -> Row:
        return {
            "block": self.block,
            "head": self.head,
            "rank": self.intervention.rank,
            "method": self.intervention.method,
        }


@dataclass(frozen=True)
class Cells:
    """heads: by block, from 0, of those that can be truncated; refused: why others cannot; blocks: those that were named."""

    heads: dict[int, Heads]
    refused: dict[int, str]
    blocks: tuple[int, ...]
    ranks: tuple[int, ...]

    @cached_property
    def given(self) -> list[Cell]:
        """Of the whole model, of each block, of each head."""
        numbers = tuple(index + 1 for index in sorted(self.heads))
        everywhere = None if not self.refused else numbers
        found = [
            Cell(Ranked("rank", everywhere, (), f"{rank}:{method}"))
            for method in METHODS
            for rank in self.ranks
        ]
        for block in self.blocks:
            found += [
                Cell(Ranked("rank", (block,), (), f"{rank}:{method}"), block)
                for method in METHODS for rank in self.ranks
            ]  # fmt: skip
            found += [
                Cell(Ranked("rank", (block,), (head,), f"{rank}:{HEAD_METHOD}"), block, head)
                for head in range(1, self.heads[block - 1].count + 1) for rank in self.ranks
            ]  # fmt: skip
        return found


@dataclass
class Planned:
    """What is scored; cells are known once the heads of the structure are read."""

    scored: Plan
    _cells: list[Cells] = field(default_factory=list)

    def cells(self, context: Context) -> Cells:
        if not self._cells:
            self._cells.append(_cells(context.structure, context.settings))
        return self._cells[0]


def _cells(structure: Structure, settings: Any) -> Cells:
    """RcProbeError for blocks and ranks that the model does not have."""
    numbers = settings.truncated_blocks()
    structure.numbered(numbers)
    heads, refused = read_heads(structure)
    for number in numbers or ():
        if number - 1 not in heads:
            why = refused.get(number - 1, "it has no attention")
            raise structure.error(
                structure.blocks[number - 1], f"its heads cannot be truncated: {why}", "Choose other blocks"
            )
    if not heads:
        return Cells({}, refused, (), ())
    width = min(each.width for each in heads.values())
    ranks = settings.truncation_ranks or tuple(2**n for n in range(20) if 2**n < width)
    if max(ranks) > width:
        what = f"heads are {width} wide, and none has rank {max(ranks)}"
        raise RcProbeError(what, where="--truncation-ranks", todo=f"Give ranks from 0 to {width}")
    blocks = tuple(index + 1 for index in sorted(heads)) if numbers is None else numbers
    return Cells(heads, refused, blocks, tuple(sorted(set(ranks))))


def truncation(context: Context, plan: Planned) -> Found:
    """Rows of both tables, in the order of the cells, then the smallest ranks and the model that has them."""
    cells, scored, structure = plan.cells(context), plan.scored, context.structure
    if not cells.heads:
        raise RcProbeError(next(iter(cells.refused.values()), "no block attends"))
    notes = [*scored.notes, *_prepare(context, plan, cells)]
    whole = [cell for cell in cells.given if cell.block is None]
    named = [structure.blocks[block - 1] for block in cells.blocks]
    rows_of_attention = DivergenceReader({cell.name: (cell.block, cell.head) for cell in cells.given})
    base, more = rows_of_attention.watched(structure, named)
    neighbours = NeighbourReader(structure, [cells.heads[block - 1] for block in cells.blocks], cells.ranks)
    base = base.then(neighbours.edits)
    curves = CurveReader(
        [WHOLE, *(cell.name for cell in whole if cell.intervention.method in CURVE_METHODS)], BY_LAYER, 0
    )
    edits = {cell.name: cell.intervention.edits(structure) for cell in cells.given}
    scores, said = score(
        context,
        scored,
        edits,
        {},
        base=base,
        readers=[rows_of_attention, neighbours, curves],
        stage="truncation",
        counted=True,
    )
    notes += [*more, *said, *(f"Not scored: {name}: {why}" for name, why in scores.failed.items())]
    rows = [row for cell in cells.given for row in _scored(cell, scores)]
    rows += rows_of_attention.rows(context.world, cells.given)
    rows += neighbours.rows(context.world)
    smallest = _smallest(cells, scores, context.settings.head_tolerance)
    rows += smallest + _together(context, scored, cells, smallest, scores)
    own = gather_curves(curves.curves, lambda value: context.world.gather(value, what="truncation"))
    by_layer = [*_curve_rows("transformer", own, whole), *_san(context, scored, whole)]
    return Found({"truncation": rows, "truncation_curves": by_layer}, notes, _facts(context, scored, cells))


def _prepare(context: Context, plan: Planned, cells: Cells) -> list[str]:
    """Read the plain model on the samples that are not scored; on all, and say so, where there are none."""
    numbers = tuple(index + 1 for index in sorted(cells.heads))
    asked = [Ranked("rank", numbers, (), "1:data")]
    scored, size = len(plan.scored.samples.items), context.settings.batch_size
    every = range(len(context.batches))
    others = [n for n in every if n * size >= scored]
    mine = context.world.share(others or every)
    engine.prepare(
        context.structure,
        context.batches.of(mine),
        asked,
        lambda sums: context.world.gather(sums, what="moments of heads"),
    )
    if others:
        return []
    return [
        "Subspaces by the data were chosen on the samples that they are scored on: there are no others (--samples)."
    ]


def _scored(cell: Cell, scores: Scores) -> Iterator[Row]:
    for row in scores.changes(cell.name, scores) if cell.name in scores.values else ():
        yield {**cell.place, **{key: row[key] for key in ("metric", "value", "baseline", "change")}}


def _criterion(scores: Scores) -> str:
    return next(metric for metric in CRITERIA if metric in scores.values[WHOLE])


def _smallest(cells: Cells, scores: Scores, tolerance: float) -> list[Row]:
    """Of each head of the named blocks the least rank from which on no measured one costs more than `tolerance`."""
    metric, rows = _criterion(scores), []
    base = scores.mean(WHOLE, metric)
    for block in cells.blocks:
        heads = cells.heads[block - 1]
        for head in range(1, heads.count + 1):
            found = heads.width
            for rank in sorted(cells.ranks, reverse=True):
                name = Ranked("rank", (block,), (head,), f"{rank}:{HEAD_METHOD}").label
                if name not in scores.values or scores.mean(name, metric) - base > tolerance:
                    break
                found = rank
            rows.append({
                "block": block, "head": head, "rank": found, "method": HEAD_METHOD, "metric": "smallest_rank",
                "value": float(found), "baseline": float(heads.width), "change": float(found - heads.width),
            })  # fmt: skip
    return rows


def _together(context: Context, plan: Plan, cells: Cells, smallest: list[Row], scores: Scores) -> list[Row]:
    """All heads of the named blocks at their smallest ranks at once: what that costs, and how many weights it has."""
    small = [row for row in smallest if row["rank"] < row["baseline"]]
    place = {"block": None, "head": None, "rank": None, "method": SMALLEST}
    before = after = 0
    for block in cells.blocks:
        heads = cells.heads[block - 1]
        before += heads.qk.dim * heads.width * (heads.count + heads.count // heads.groups)
        after += sum(2 * heads.qk.dim * row["rank"] for row in smallest if row["block"] == block)
    rows: list[Row] = [
        {
            **place,
            "metric": "parameters",
            "value": float(after),
            "baseline": float(before),
            "change": float(after - before),
        }
    ]
    if not small:
        return rows
    what: tuple[Intervention, ...] = tuple(
        Ranked("rank", (row["block"],), (row["head"],), f"{row['rank']}:{HEAD_METHOD}") for row in small
    )
    edits = {SMALLEST: Variant(SMALLEST, what).edits(context.structure)}
    joint, _ = score(context, plan, edits, {}, stage="smallest ranks")
    for row in joint.changes(SMALLEST, joint) if SMALLEST in joint.values else ():
        rows.append({**place, **{key: row[key] for key in ("metric", "value", "baseline", "change")}})
    return rows


def _san(context: Context, plan: Plan, whole: Sequence[Cell]) -> list[Row]:
    """The collapse of pure attention with heads of each rank."""
    structure = context.structure
    san = paper_variants(structure)[0].interventions
    chosen = [cell for cell in whole if cell.intervention.method in CURVE_METHODS]
    edits: dict[str, Edits] = {SAN: Variant(SAN, san).edits(structure)}
    edits |= {cell.name: Variant(cell.name, (*san, cell.intervention)).edits(structure) for cell in chosen}
    reader = CurveReader(edits, BY_LAYER, 0)
    made = plan.batches(context.loaded, context.settings)
    mine: Iterator[Batch] = made.of(context.world.share(range(len(made))))
    engine.run(
        structure, mine, edits, [reader], advance=lambda name: context.advance(f"truncation: SAN, {name}")
    )
    found = gather_curves(
        reader.curves, lambda value: context.world.gather(value, what="truncation of the SAN")
    )
    found[WHOLE] = found.pop(SAN)
    return list(_curve_rows(SAN, found, chosen))


def _curve_rows(network: str, curves: dict[str, Any], whole: Sequence[Cell]) -> Iterator[Row]:
    own = {(row["layer"], row["metric"]): row["mean"] for row in curves[WHOLE].rows()}
    for cell in whole:
        for row in curves[cell.name].rows() if cell.name in curves else ():
            yield {
                "network": network, "rank": cell.intervention.rank, "method": cell.intervention.method, "layer": row["layer"],
                "metric": row["metric"], "value": row["mean"], "baseline": own[row["layer"], row["metric"]],
            }  # fmt: skip


def _facts(context: Context, plan: Plan, cells: Cells) -> dict[str, Any]:
    first = cells.heads[cells.blocks[0] - 1]
    return {
        "task": plan.task.name if plan.task else None, "samples": len(plan.samples.items), "blocks": list(cells.blocks),
        "ranks": list(cells.ranks), "heads": first.count, "width": first.width, "dim": first.qk.dim,
        "context": context.shape.tokens, "tolerance": context.settings.head_tolerance, "grouped": first.groups > 1,
        "refused": sorted(index + 1 for index in cells.refused),
    }  # fmt: skip
