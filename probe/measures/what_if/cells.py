"""The cells of the tables `masks`, `norms` and `phase`: lists of interventions, run by the engine and scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rc_probe import engine
from rc_probe.hooks.edits.attention.masks import looks_ahead
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.example_inputs import small
from rc_probe.hooks.structure.structure import Structure
from rc_probe.interventions.gate import Gated
from rc_probe.interventions.intervention import Intervention, Variant
from rc_probe.interventions.mask import Masked
from rc_probe.interventions.norm import FORMS, Normed
from rc_probe.interventions.paper import paper_variants
from rc_probe.measures.curves import SVD, SVD_SAMPLES
from rc_probe.measures.importance.scored import BULK, Plan, Scores, score
from rc_probe.measures.measurement import Found
from rc_probe.measures.variant_passes import CurveReader, stream_pass
from rc_probe.metrics.layer_curves import Curves, gather_curves
from rc_probe.registry import WHOLE
from rc_probe.results.tables import Row

from .axes import OWN

if TYPE_CHECKING:
    from rc_probe.budget import Shape
    from rc_probe.data.batches import Batch
    from rc_probe.measures.context import Context

BY_LAYER = ("residual_bulk", "residual_frobenius", "residual_frobenius_absolute", "cosine")
AT_LAST = ("cosine_absolute", "effective_rank")
# The model's own mask and these: of a model that looks ahead, and of one that does not.
AHEAD = ("causal", "window:8", "window:1", "left:8", "left:1")
BACK = ("complete", "left:32", "left:8", "left:1", "sink:4,left:8")
RANKS = 0.02  # passes that these may cost in each cell
COMPLETE = Masked("mask", value="complete")
UNSCORED = "With the complete mask a causal model reads the tokens that it is to predict: what it predicts is not scored."


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its place there, and what is done to the model."""

    table: str
    place: Row
    interventions: tuple[Intervention, ...]

    @property
    def variant(self) -> Variant:
        return Variant(self.spec, self.interventions)

    @property
    def spec(self) -> str:
        """Cells that are the same thing have the same one; `transformer` is the model as it is."""
        return "+".join(each.label for each in self.interventions) or WHOLE


def networks(structure: Structure) -> dict[str, tuple[Intervention, ...]]:
    """The networks that masks are tried in; without norms where the model's can be left out."""
    paper = {variant.name: variant.interventions for variant in paper_variants(structure)}
    bare: tuple[Intervention, ...] = (Normed("norm", value="identity"),)
    return {
        "SAN − norm": paper["SAN"] + bare, "SAN": paper["SAN"], "SAN+skip": paper["SAN+skip"],
        WHOLE: (), f"{WHOLE} − norm": bare, f"{WHOLE} − skip": (Gated("skip"),),
    }  # fmt: skip


class Planned:
    """What is scored, and the cells: tried once, when the model is there. ahead: whether its tokens see later ones."""

    def __init__(self, scored: Plan) -> None:
        self.scored = scored
        self._cells: list[Cell] | None = None
        self.notes: list[str] = []
        self.ahead = False

    def cells(self, context: Context) -> list[Cell]:
        """The cells that this model can have; `notes` say which it cannot."""
        if self._cells is None:
            trying = _Trying(context.structure, context.first)
            self.ahead = _ahead(context.structure, context.first)
            self._cells = [
                *_masks(context, trying, ahead=self.ahead),
                *_norms(context, trying),
                *_map(context, trying),
            ]
            self.notes = trying.notes
        return self._cells


def _masks(context: Context, trying: _Trying, *, ahead: bool) -> Iterator[Cell]:
    if not (context.settings.masks or context.settings.what_if):
        return
    masks = trying.possible([Masked("mask", value=value) for value in (AHEAD if ahead else BACK)])
    nets = trying.nets(networks(context.structure))
    for mask in (None, *masks) if masks else ():
        for name, net in nets.items():
            place: Row = {"mask": OWN if mask is None else mask.value, "network": name}
            yield Cell("masks", place, net + (() if mask is None else (mask,)))


def _norms(context: Context, trying: _Trying) -> Iterator[Cell]:
    if not (context.settings.norms or context.settings.what_if):
        return
    norms = trying.possible([Normed("norm", value=form) for form in FORMS])
    nets = networks(context.structure)
    for norm in (None, *norms) if norms else ():
        for name in ("SAN", "SAN+skip", WHOLE):
            place: Row = {"norm": OWN if norm is None else norm.value, "network": name}
            yield Cell("norms", place, nets[name] + (() if norm is None else (norm,)))


def _map(context: Context, trying: _Trying) -> Iterator[Cell]:
    axes = context.settings.axes()
    if not axes:
        return
    x, y = axes
    tried = [point.intervention for axis in axes for point in axis.points if point.intervention is not None]
    with suppress(RcProbeError):  # of heads that cannot be read: trying says why
        engine.prepare(
            context.structure, context.batches.of(context.numbers), tried,
            lambda sums: context.world.gather(sums, what="plain readings"),
        )  # fmt: skip
    possible = trying.possible(tried)
    if not all(any(point.intervention in possible for point in axis.points) for axis in axes):
        return  # of one of them no value can be tried
    for one in x.points:
        for other in y.points:
            both = tuple(each for each in (one.intervention, other.intervention) if each is not None)
            if all(each in possible for each in both):
                yield Cell("phase", {
                    "x": x.name, "x_value": one.value, "x_own": one.intervention is None,
                    "y": y.name, "y_value": other.value, "y_own": other.intervention is None,
                }, both)  # fmt: skip


class _Trying:
    """Tries interventions on two samples, before anything is measured: what this model cannot do is a note."""

    def __init__(self, structure: Structure, first: Batch) -> None:
        self.structure, self.inputs = structure, small(first.inputs)
        self._failed: dict[str, list[str]] = {}  # by the reason: what

    @property
    def notes(self) -> list[str]:
        return [f"Not tried: {', '.join(names)}: {why}" for why, names in self._failed.items()]

    def possible(self, given: Iterable[Intervention]) -> list[Intervention]:
        return [each for each in given if self._runs(each.label, (each,))]

    def nets(self, given: dict[str, tuple[Intervention, ...]]) -> dict[str, tuple[Intervention, ...]]:
        return {name: net for name, net in given.items() if not net or self._runs(name, net)}

    def _runs(self, name: str, what: tuple[Intervention, ...]) -> bool:
        try:
            edits = Variant(name, what).edits(self.structure)
            with measuring(self.structure.model):
                stream_pass(self.structure, self.inputs, edits, lambda layer, x: None)
        except RcProbeError as error:
            self._failed.setdefault(str(error), []).append(name)
            return False
        return True


def _ahead(structure: Structure, first: Batch) -> bool:
    """Whether a token sees later ones; of a model whose masks cannot be seen, no."""
    found: list[bool] = []
    try:
        block, op = structure.attention_ops(None)[0]
    except RcProbeError:
        return False
    row = 0 if first.mask is None else int(first.mask.sum(1).argmax())
    edits = Edits()
    edits.watch_op(block.index, op, lambda call, result: found.append(looks_ahead(call, op.heads, row)))
    try:
        with measuring(structure.model):
            stream_pass(structure, first.inputs, edits, lambda layer, x: None)
    except RcProbeError:  # of an implementation whose mask is not known: trying a mask says so
        return False
    return any(found)


def what_if(context: Context, plan: Planned) -> Found:
    """Rows of the tables, in the order of the cells."""
    structure, cells, scored = context.structure, plan.cells(context), plan.scored
    edits = {cell.spec: cell.variant.edits(structure) for cell in cells if cell.interventions}
    by_layer = {cell.spec for cell in cells if cell.table != "phase"}
    few = _few(context.shape, len(scored.samples.items))
    reader = CurveReader(by_layer | {WHOLE}, (*BY_LAYER, *AT_LAST), few, slow_at=structure.depth)
    readers = [reader] if by_layer else []
    scores, notes = score(context, scored, edits, {}, readers=readers, stage="what if", counted=True)
    curves = gather_curves(reader.curves, lambda value: context.world.gather(value, what="what if"))
    unscored = {cell.spec for cell in cells if COMPLETE in cell.interventions and not plan.ahead}
    tables: dict[str, list[Row]] = {}
    for cell in cells:
        rows = tables.setdefault(cell.table, [])
        own = [row for row in _scored(cell, scores) if row["metric"] == BULK or cell.spec not in unscored]
        if cell.table == "phase":
            rows += own
            continue
        last = {"layer": structure.depth, "std": None, "floor": None}
        rows += [*_curves(cell, curves), *({**row, **last} for row in own if row["metric"] != BULK)]
    notes += [f"Not scored: {name}: {why}" for name, why in scores.failed.items()]
    notes += [UNSCORED] if unscored else []
    facts = {"task": scored.task.name if scored.task else None, "samples": len(scored.samples.items)}
    return Found(tables, [*scored.notes, *plan.notes, *notes], facts)


def _few(shape: Shape, samples: int) -> int:
    """Samples that ranks and absolute cosines are measured on, at the last layer of each cell: as many as RANKS allows."""
    one = float(SVD) * shape.tokens * shape.dim * min(shape.tokens, shape.dim)
    return max(1, min(SVD_SAMPLES, int(RANKS * samples * shape.plain() / one)))


def _curves(cell: Cell, curves: dict[str, Curves]) -> Iterator[Row]:
    """Of each metric and layer, beside the same of the whole model."""
    own = {(row["layer"], row["metric"]): row["mean"] for row in curves[WHOLE].rows()}
    for row in curves[cell.spec].rows():
        baseline = own[row["layer"], row["metric"]]
        yield {
            **cell.place, "spec": cell.spec, "layer": row["layer"], "metric": row["metric"], "value": row["mean"],
            "std": row["std"], "floor": row["floor"], "baseline": baseline, "change": row["mean"] - baseline,
            "low": None, "high": None, "count": row["count"],
        }  # fmt: skip


def _scored(cell: Cell, scores: Scores) -> Iterator[Row]:
    """What it predicts, and the residual of the bulk at the last layer."""
    if cell.spec in scores.values:
        for row in scores.changes(cell.spec, scores):
            yield {**cell.place, "spec": cell.spec, **row}
