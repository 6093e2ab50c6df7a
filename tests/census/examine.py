"""One model type of the library: built small, attached, checked; what came of it as a row of the table."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from census.build import NotBuilt, build, category, reason
from census.check import Checks, Wrong, gates_at_one
from census.inputs import inputs_for
from torch import Tensor, nn

from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import Structure
from rc_probe.paths import decompose, terms
from rc_probe.paths.decompose import hops
from rc_probe.results.tables import Row

CHECKS = {
    "gates at one": Checks.gates_at_one,
    "branches off": Checks.branches_off,
    "last map zeroed": Checks.zeroed_writers,
    "skips off": Checks.skips_off,
    "everything off": Checks.everything_off,
    "kinds": Checks.kinds,
    "gates per sample": Checks.gates_per_sample,
}


def examine(model_type: str) -> Row:
    """The row of a model type: its status, the stacks found in it, and what each check compared.

    status: proved (attached, and every check that applies holds), wrong (attached, and one does not),
    refused (not attached), not run (no forward pass of the small model), not built.
    """
    row: Row = {
        "model_type": model_type,
        "category": category(model_type),
        "status": "not built",
        "reason": "",
    }
    try:
        model = build(model_type)
        row |= {"class": type(model).__name__, "status": "not run"}
        inputs = inputs_for(model)
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        return row | {"reason": str(error) if isinstance(error, NotBuilt) else reason(error)}
    try:
        structure = find_structure(model, inputs)
    except RcProbeError as error:
        return row | {"status": "refused", "reason": _short(error) + _measured(model, inputs)}
    row |= {"status": "proved"} | _describe(structure)
    stacks = [structure, *_other_stacks(model, inputs, structure, row)]
    row["stacks"] = [_describe(s) for s in stacks]
    try:
        row["checks"] = _checks(stacks, inputs)
        row["checks"] |= _other_forms(model_type, structure)
        row["stacks"] = [
            stack | paths_of(found, inputs) for found, stack in zip(stacks, row["stacks"], strict=True)
        ]
        row |= {key: row["stacks"][0][key] for key in ("paths", "paths_error")}
    except Wrong as error:
        row |= {"status": "wrong", "reason": str(error)}
    return row


def _describe(structure: Structure) -> Row:
    """What a stack is: how its attention is owned, what its blocks have besides sums of branches."""
    branches = [branch for block in structure.blocks for branch in block.branches]
    owned = {op.via for branch in branches for op in branch.ops if branch.kind in {"attention", "cross"}}
    peculiar = {
        "inner skips": any(branch.inner for branch in branches),
        "scaled skips": any(block.scaled for block in structure.blocks),
        "no batch axis": any(block.batch_axis is None for block in structure.blocks),
        "features first": any(block.feature_axis != -1 for block in structure.blocks),
    }
    return {
        "stack": structure.name,
        "blocks": structure.depth,
        "signature": structure.signature,
        "attention_op": ", ".join(sorted(owned)),
        "peculiar": [name for name, has in peculiar.items() if has],
    }


def _measured(model: nn.Module, inputs: dict[str, Any]) -> str:
    """What can be done with a model all the same whose blocks mix several streams."""
    try:
        mixed = find_structure(model, inputs, several=True).mixed
    except RcProbeError:
        return ""
    return "; each of them is measured" if mixed else ""


def _short(error: RcProbeError) -> str:
    return f"{error.where}: {error.what}"


def _other_stacks(model: nn.Module, inputs: dict[str, Any], first: Structure, row: Row) -> list[Structure]:
    found = []
    no_stack = ("not held by modules", "hand on no stream as it is", "are no modules")
    refused = [text for text in first.refused if not any(words in text for words in no_stack)]
    for name in first.others:
        try:
            found.append(find_structure(model, inputs, stack=name))
        except RcProbeError as error:
            refused.append(f"{name}: {_short(error)}")
    row["reason"] = "; ".join(dict.fromkeys(refused))
    return found


def _checks(stacks: list[Structure], inputs: dict[str, Any]) -> dict[str, int]:
    """How many facts each check compared, over all stacks."""
    others = inputs_for(stacks[0].model, seed=5)
    counts = dict.fromkeys(CHECKS, 0)
    for structure in stacks:
        checks = Checks(structure, inputs, others)
        for name, check in CHECKS.items():
            try:
                counts[name] += check(checks)
            except Wrong as error:
                raise Wrong(f"{structure.name}, {name}: {error}") from error
    return counts


def _other_forms(model_type: str, structure: Structure) -> dict[str, int | None]:
    """(8) Another shape and padding with the structure as it is, and bfloat16; None where the model cannot."""
    model = structure.model
    return {
        "another shape": _holds(structure, lambda: inputs_for(model, batch=3, length=9)),
        "padding": _holds(structure, lambda: inputs_for(model, padded=True)),
        "bfloat16": _bfloat16(model_type, structure),
    }


def _holds(structure: Structure, make: Callable[[], dict[str, Any]]) -> int | None:
    """Whether gates of 1 are bitwise nothing on these inputs; None where the model itself cannot run them."""
    try:
        inputs = make()
        with torch.no_grad():
            structure.model(**inputs)
    except Exception:  # the model's own, of any kind
        return None
    return gates_at_one(structure, inputs)


def _bfloat16(model_type: str, structure: Structure) -> int | None:
    try:
        model = build(model_type, dtype=torch.bfloat16)
        inputs = inputs_for(model)
        with torch.no_grad():
            model(**copy.copy(inputs))
    except Exception:
        return None
    try:
        again = find_structure(model, inputs, stack=structure.name)
    except RcProbeError as error:
        if "its forward pass fails" in error.what:
            return None
        raise Wrong(f"in bfloat16: {_short(error)}") from error
    if again.signature != structure.signature:
        raise Wrong(f"in bfloat16: {again.signature}, not {structure.signature}")
    return Checks(again, inputs, inputs).branches_off()


EXACT, NO_HEADS = "exact", "exact, by block"


def paths_of(structure: Structure, inputs: dict[str, Any]) -> Row:
    """(9) The paths of a stack. paths: "exact", "exact, by block" where heads are not told apart, or why there are none.

    paths_error: how far they are from adding up to its output, relative to that. The paths of length 1 one by one
    have to be the part of length 1.
    """
    row: Row = {"paths": "", "paths_error": None}
    try:
        whole = decompose(structure, inputs)
        row |= {"paths": EXACT, "paths_error": float(f"{whole.error:.1e}")}
        heads = [step.heads for step in hops(structure)]
        single = terms(structure, inputs, one_head_each(heads))
    except RcProbeError as error:
        return row | {"paths": NO_HEADS if row["paths"] else error.what}
    largest = max(float(single.abs().max()), float(whole.parts.abs().max()))
    off = float((single.sum(0) - whole.length(1)).abs().max()) / (largest or 1.0)
    if not off <= 1e-5:
        raise Wrong(f"{structure.name}: its paths of length 1 add up to that length only within {off:.1e}")
    return row


def one_head_each(heads: list[int]) -> Tensor:
    """All paths of length 1, (paths, steps)."""
    out = torch.zeros(sum(heads), len(heads), dtype=torch.long)
    taken = [(step, head) for step, count in enumerate(heads) for head in range(1, count + 1)]
    for path, (step, head) in zip(out, taken, strict=True):
        path[step] = head
    return out
