"""The parts of a model, each removed alone: rows of the table `importance`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.edits.gates import has_component
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import Block, Structure
from rc_probe.interventions.gate import Gated
from rc_probe.measures.measurement import Found
from rc_probe.results.findings.removal_checks import PARTS
from rc_probe.results.tables import Row

from .proxies import BRANCHES, BlockReader, BranchReader, proxy_rows, together
from .scored import Plan, Scores, score

if TYPE_CHECKING:
    from rc_probe.measures.context import Context


def removals(structure: Structure, parts: str) -> list[Gated]:
    """What is removed alone: every block, and of each block its parts or heads. parts: `blocks`, `parts` or `heads`."""
    found = [Gated("block", (block.index + 1,)) for block in structure.blocks]
    for block in structure.blocks:
        number = (block.index + 1,)
        if parts == "parts":
            found += [Gated(part, number) for part in PARTS if has_component(block, part)]
        if parts == "heads":
            found += [Gated("head", number, (head,)) for head in range(1, _heads(block) + 1)]
    return found


def _heads(block: Block) -> int:
    """How many heads of a block can be told apart; 0 without attention."""
    return min((branch.heads for branch in block.branches if branch.kind == "attention"), default=0)


def importance(context: Context, plan: Plan, parts: str) -> Found:
    """Rows of the table, in the order of the parts; proxies of blocks, and of branches with `parts`."""
    structure, given = context.structure, removals(context.structure, parts)
    edits, notes = _possible(structure, given)
    readers: list[BlockReader | BranchReader] = [BlockReader()]
    passes: dict[str, Edits] = dict(edits)
    if parts == "parts":
        readers.append(branches := BranchReader(structure))
        passes[BRANCHES] = branches.edits
    scores, more = score(context, plan, passes, {}, readers=readers, stage="importance", counted=True)
    rows = [row for each in given if each.label in edits for row in _rows(each, scores)]
    rows += _proxies(context, readers)
    notes += [f"Not removed: {name}: {why}" for name, why in scores.failed.items()]
    notes += _without_proxy(structure, rows)
    if parts == "heads" and not any(each.part == "head" for each in given):
        notes.append("No heads were removed: none can be told apart.")
    facts = {"task": plan.task.name if plan.task else None, "samples": len(plan.samples.items)}
    return Found({"importance": rows}, [*plan.notes, *more, *notes], facts)


def _possible(structure: Structure, given: list[Gated]) -> tuple[dict[str, Edits], list[str]]:
    """The edits of each part by its label, and notes on those that cannot be removed."""
    edits, notes = {}, []
    for each in given:
        try:
            edits[each.label] = each.edits(structure)
        except RcProbeError as error:
            notes.append(f"Not removed: {each.label}: {error}")
    return edits, notes


def _rows(each: Gated, scores: Scores) -> list[Row]:
    if each.label in scores.failed:
        return []
    (block,) = each.blocks or (None,)
    place = {"component": each.part, "block": block, "head": each.heads[0] if each.heads else None}
    return [place | row for row in scores.changes(each.label, scores)]


def _without_proxy(structure: Structure, rows: list[Row]) -> list[str]:
    """A note on blocks between whose two streams no angle is."""
    with_one = {row["block"] for row in rows if row["metric"] == "proxy_block_influence"}
    without = [str(block.index + 1) for block in structure.blocks if block.index + 1 not in with_one]
    if not without:
        return []
    those = f"block{'s' * (len(without) > 1)} {', '.join(without)}"
    return [f"No proxies of {those}: the stream has another shape behind than before, tokens merged."]


def _proxies(context: Context, readers: list[BlockReader | BranchReader]) -> list[Row]:
    rows: list[Row] = []
    for reader in readers:
        parts = context.world.gather(reader.seen, what="proxies")
        for (block, what), values in together(part for own in parts for part in own).items():
            if isinstance(reader, BlockReader):
                names = ("proxy_block_influence", "proxy_angular_distance")
                rows += proxy_rows("block", block, names, values)
            else:
                rows += proxy_rows(what, block, ("proxy_branch_norm", "proxy_branch_cosine"), values)
    return rows
