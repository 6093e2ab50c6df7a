"""Proved structures, said to be otherwise in one place: they are frozen, so each function returns another."""

from dataclasses import replace
from typing import Any

from rc_probe.hooks.structure.structure import Structure


def with_block(structure: Structure, block: int, **fields: Any) -> Structure:
    """`structure`, block number `block` (as in a list) with other fields."""
    blocks = list(structure.blocks)
    blocks[block] = replace(blocks[block], **fields)
    return replace(structure, blocks=tuple(blocks))


def with_junction(structure: Structure, block: int, junction: int, **fields: Any) -> Structure:
    junctions = list(structure.blocks[block].junctions)
    junctions[junction] = replace(junctions[junction], **fields)
    return with_block(structure, block, junctions=tuple(junctions))


def with_branch(structure: Structure, block: int, junction: int, **fields: Any) -> Structure:
    """With other fields of the first branch of a junction."""
    first, *others = structure.blocks[block].junctions[junction].branches
    return with_junction(structure, block, junction, branches=(replace(first, **fields), *others))
