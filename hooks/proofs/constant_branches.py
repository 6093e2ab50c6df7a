"""Branches that add the same to every token, whatever enters them: zeros, or a bias.

Blocks that are grown into a trained model start with output maps of zero, and pruning leaves such maps. Nothing
that runs can show what kind of branch that is, so the kind is that of the same branch in another block of the model
that is built alike. What is proved of the block otherwise holds for these branches, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rc_probe.hooks.structure.structure import (
    Block,
    Branch,
    Candidate,
    CandidateBlock,
    CandidateBranch,
    Junction,
    Kind,
    Site,
)


@dataclass(frozen=True)
class Proved:
    """A block with what is proved of it by itself. kinds: of its branches, None where one is constant."""

    block: CandidateBlock
    kinds: Mapping[Site, Kind | None]
    scaled: bool


def is_constant(value: Tensor, other: Tensor, feature_axis: int) -> bool:
    """Whether what a branch adds is the same for all tokens of all samples, and for both inputs, bit by bit."""
    rows = value.movedim(feature_axis, -1).flatten(0, -2)
    return torch.equal(value, other) and bool((rows == rows[0]).all())


def with_kinds(candidate: Candidate, proved: Sequence[Proved]) -> tuple[Block, ...]:
    """The blocks, the kinds of constant branches taken from their siblings.

    Raises RcProbeError where no sibling tells it.
    """
    return tuple(_block(candidate, one, proved) for one in proved)


def _block(candidate: Candidate, one: Proved, proved: Sequence[Proved]) -> Block:
    junctions = []
    for number, junction in enumerate(one.block.junctions):
        branches = []
        for branch in junction.branches:
            kind = one.kinds[branch.site]
            constant = kind is None
            if kind is None:
                kind = _kind_of_siblings(candidate, one.block, branch, number, proved)
            branches.append(Branch(**vars(branch), kind=kind, constant=constant))
        junctions.append(Junction(**vars(junction) | {"branches": tuple(branches)}))
    return Block(**vars(one.block) | {"junctions": tuple(junctions), "scaled": one.scaled})


def _kind_of_siblings(
    candidate: Candidate,
    block: CandidateBlock,
    branch: CandidateBranch,
    number: int,
    proved: Sequence[Proved],
) -> Kind:
    kinds = set(_sibling_kinds(candidate, block, branch, number, proved))
    if len(kinds) == 1:
        return kinds.pop()
    where = block.junctions[number].where
    what = f"what its branch {branch.source or 'of its own'} adds to the stream at {where} is the same for every token and input"
    if kinds:
        why = f", and in blocks built alike it is {' or '.join(sorted(kinds))}"
    else:
        why = ", and so it is in every block built alike: whether it is attention or an MLP cannot be shown"
    raise candidate.error(
        block,
        what + why,
        "Weights of zero do that, as in a model that is not trained yet: give trained weights, "
        "or a model in which this branch of at least one block writes something else",
    )


def _sibling_kinds(
    candidate: Candidate,
    block: CandidateBlock,
    branch: CandidateBranch,
    number: int,
    proved: Sequence[Proved],
) -> Iterator[Kind]:
    """The kinds of the same branch in blocks of the same modules, where these are proved."""
    mine = _modules(candidate, block)
    for other in proved:
        if len(other.block.junctions) != len(block.junctions) or _modules(candidate, other.block) != mine:
            continue
        for like in other.block.junctions[number].branches:
            kind = other.kinds[like.site]
            if kind is not None and _form(like) == _form(branch):
                yield kind


def _modules(candidate: Candidate, block: CandidateBlock) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in candidate.module(block).named_modules()]


def _form(branch: CandidateBranch) -> CandidateBranch:
    """A branch without what may differ between blocks built alike: the block's number, how many heads it has."""
    ops = tuple(replace(op, heads=0) for op in branch.ops)
    return replace(branch, site=replace(branch.site, block=0), ops=ops)
