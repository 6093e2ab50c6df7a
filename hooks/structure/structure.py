"""What a stack of blocks is made of: blocks, their junctions and branches, and the places of edits.

Discovery returns a `Candidate`. Attach proves it and returns a `Structure`: the same, and what the proofs add.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from rc_probe.hooks.errors import RcProbeError

from .tape import SDPA, Place

if TYPE_CHECKING:
    from .flow import Flow

Kind = Literal["attention", "cross", "mixer", "mlp"]
KIND_LETTER: dict[Kind, str] = {"attention": "A", "cross": "X", "mixer": "C", "mlp": "M"}
INTERFACE = "interface"
REPORT = "Report it, with the model's config, on the issue tracker of rc-probe"


@dataclass(frozen=True)
class Site:
    """One operand of a junction's add: block call (from 0), ordinal of the add in it, operand 0 or 1."""

    block: int
    ordinal: int
    operand: int


@dataclass(frozen=True)
class AttentionOp:
    """An attention op of a block call: its number among those with the same owner, its owner, its heads.

    `via` is `interface`, where its output is (batch, tokens, heads, dim), or what is intercepted:
    `scaled_dot_product_attention`, (batch, heads, tokens, dim), or `softmax`, whose output is the
    pattern (batch, heads, queries, keys). The heads of these two may be folded into the batch.
    """

    ordinal: int
    via: str
    heads: int  # of the queries, as they can be told apart in its output; 0 where they cannot


@dataclass(frozen=True)
class CandidateBranch:
    """What a block seems to add to the stream."""

    site: Site
    ops: tuple[AttentionOp, ...]
    has_product: bool  # multiplies two values computed from the stream, and is no scan
    outside: bool  # multiplies one with a value computed elsewhere: cross-attention
    convolves: bool  # has a convolution or pooling, which may move little between tokens
    inner: int  # residual adds inside the branch, which stay as they are
    reads: int  # the last junction of the block whose sum it is computed from; -1: what enters the block
    source: str  # the module inside the block that makes it, by its name there

    @property
    def attends(self) -> bool:
        """Whether it weighs values of the stream by values of the stream: if it mixes tokens, it is attention."""
        return self.has_product or any(op.via in {SDPA, INTERFACE} for op in self.ops)


@dataclass(frozen=True)
class Branch(CandidateBranch):
    """What a block adds to the stream."""

    kind: Kind
    constant: bool  # adds the same to every token, whatever enters it: its kind is that of its siblings

    @property
    def heads(self) -> int:
        """The heads of each of its attention ops; 0 where these cannot be told apart, or differ."""
        counts = {op.heads for op in self.ops}
        return counts.pop() if len(counts) == 1 else 0


@dataclass(frozen=True)
class NormCall:
    """A norm in a block: the stream itself goes through it (post-LN), or what a branch reads of the stream does.

    `turn` counts the calls of the module within one block call; it is -1 when the block calls the
    norm as a function, so that there is no module to bypass.
    """

    name: str
    turn: int


@dataclass(frozen=True)
class CandidateJunction:
    """The add where a skip and what seem to be its branches meet. Parallel blocks have several branches in one."""

    skip: Site
    branches: tuple[CandidateBranch, ...]
    norms: tuple[NormCall, ...]
    where: str  # file:line of the add

    @property
    def sites(self) -> tuple[Site, ...]:
        """Of the skip, then of the branches."""
        return self.skip, *(branch.site for branch in self.branches)


@dataclass(frozen=True)
class Junction(CandidateJunction):
    """The add where a skip and its branches meet."""

    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class CandidateBlock:
    """One call of what seems to be a repeated layer: call `turn` (from 0) of the `turns` of its module in a pass."""

    index: int
    name: str
    turn: int
    turns: int
    junctions: tuple[CandidateJunction, ...]
    entry: Place  # where the stream is in (args, kwargs)
    exit: Place  # where the stream is in the output
    forms: frozenset[tuple[int, int]]  # (axes, features) of the adds at its junctions
    adds: int  # how many adds of these forms one call makes
    attention_ops: int  # how many softmax / attention calls of three or more axes one call makes
    ndim: int
    dim: int
    batch_axis: int | None
    feature_axis: int  # -1; 1 in convolutional blocks, whose stream is (batch, features, height, width)
    add_axis: int  # the same at its adds: -1 where a block turns such a stream to have its features last
    routed: int  # how many calls of the attention interface one call makes, where we own it
    flow: Flow  # which of its operations and modules are used for what
    norms: tuple[NormCall, ...]  # that the stream goes through before the first add
    branch_norms: tuple[NormCall, ...]  # that branches read the stream through
    normed_before: (
        str  # the name of the first of them, or of what normalises it there without a module; "": none
    )
    streams: int  # that it hands on side by side
    stream_axis: int  # along which they lie where there are several; else -1

    @property
    def branches(self) -> tuple[CandidateBranch, ...]:
        return tuple(b for j in self.junctions for b in j.branches)

    @property
    def every_norm(self) -> tuple[NormCall, ...]:
        """Those on the stream, then those that branches read through."""
        return (*self.norms, *(n for j in self.junctions for n in j.norms), *self.branch_norms)

    def outside(self, value: Tensor, shape: Sequence[int]) -> Tensor:
        """A value of an add inside, in the layout of the stream outside, whose shape is `shape`."""
        if self.add_axis == self.feature_axis:
            return value.reshape(shape)
        return value.movedim(self.add_axis, self.feature_axis)

    def inside(self, value: Tensor) -> Tensor:
        """A stream as it is outside, in the layout that it has at the adds."""
        return value.movedim(self.feature_axis, self.add_axis)


@dataclass(frozen=True)
class Block(CandidateBlock):
    """One call of a repeated layer, proved."""

    junctions: tuple[Junction, ...]
    scaled: bool  # its skips carry the stream times a fixed factor

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(b for j in self.junctions for b in j.branches)

    @property
    def signature(self) -> str:
        """For example `An|Mn` (BERT), `A|M` (GPT-2), `A+M` (GPT-NeoX); n is a norm on the stream."""
        if not self.junctions:
            return f"{self.streams} streams"
        parts = []
        for j in self.junctions:
            letters = sorted((KIND_LETTER[b.kind] for b in j.branches), key="AXCM".index)
            parts.append("+".join(letters) + "n" * len(j.norms))
        return "|".join(parts)


@dataclass(frozen=True, eq=False)
class Candidate:
    """What seems to be a stack of blocks, in the order in which they are called. Nothing of it is proved.

    name: the module path that its blocks share, for example `encoder.layer` or `decoder.block`
    others: names of the model's further stacks; refused: why what looked like one is none
    unowned: why the library's attention interface is not used, where owning it was tried in vain
    """

    name: str
    owner: weakref.ref[nn.Module]  # weak, so that a cached structure keeps no model alive
    blocks: tuple[CandidateBlock, ...]
    ancestors: tuple[str, ...]  # modules whose call contains all block calls, once per forward pass
    before: tuple[str, ...]  # modules called once and done before the first block: encoders, embeddings
    others: tuple[str, ...]
    refused: tuple[str, ...]
    unowned: str

    @property
    def model(self) -> nn.Module:
        model = self.owner()
        if model is None:
            raise RcProbeError("the model that was attached no longer exists", todo="Attach again")
        return model

    def module(self, block: CandidateBlock) -> nn.Module:
        return self.model.get_submodule(block.name)

    def error(self, block: CandidateBlock, what: str, todo: str) -> RcProbeError:
        """An error that names the model and the block."""
        where = f"{type(self.model).__name__}, block {block.index + 1} ({block.name})"
        return RcProbeError(what, where=where, todo=todo)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def dim(self) -> int:
        return self.blocks[-1].dim

    @property
    def streams(self) -> int:
        """How many streams its blocks hand on side by side."""
        return self.blocks[-1].streams

    @property
    def mixed(self) -> bool:
        """Whether its blocks mix several streams, so that it has no junctions: it can be measured, and not edited."""
        return not self.blocks[-1].junctions


@dataclass(frozen=True, eq=False)
class Structure(Candidate):
    """A stack of blocks of a model. All of it is proved, as `proved` says, and nothing writes to it."""

    blocks: tuple[Block, ...]
    proved: tuple[str, ...]

    def numbered(self, numbers: tuple[int, ...] | None) -> list[Block]:
        """The blocks with these numbers, from 1; None: all. RcProbeError where one is not there."""
        for number in numbers or ():
            if not 1 <= number <= self.depth:
                raise RcProbeError(
                    f"there is no block {number}",
                    where=type(self.model).__name__,
                    todo=f"Blocks are numbered 1 to {self.depth}",
                )
        return list(self.blocks) if numbers is None else [self.blocks[number - 1] for number in numbers]

    def attention_ops(self, numbers: tuple[int, ...] | None) -> list[tuple[Block, AttentionOp]]:
        """The attention ops of these blocks, from 1; None: of all that attend. RcProbeError where one cannot be seen."""
        blocks = self.numbered(numbers)
        attending = [b for b in blocks if any(branch.kind == "attention" for branch in b.branches)]
        without = [b for b in blocks if b not in attending] if numbers or not attending else []
        for block in without:
            raise self.error(
                block, f"it has no attention; its branches are {block.signature}", "Choose another block"
            )
        found = []
        for block in attending:
            ops = [op for branch in block.branches if branch.kind == "attention" for op in branch.ops]
            if not ops:
                what = self.unseen(
                    "no softmax or scaled_dot_product_attention was seen in its attention branch"
                )
                raise self.error(block, what, "Load the model with attn_implementation='eager' or 'sdpa'")
            found += [(block, op) for op in ops]
        return found

    def norm_calls(self, numbers: tuple[int, ...] | None) -> list[tuple[Block, NormCall]]:
        """The norms of these blocks, from 1; None: of all that have one. RcProbeError where one is no module."""
        blocks = self.numbered(numbers)
        normed = [block for block in blocks if block.every_norm]
        for block in [b for b in blocks if b not in normed] if numbers or not normed else []:
            what = "it has no norm on the stream or at a branch's input"
            raise self.error(block, what, "Choose another block, or leave the norms alone")
        found = [(block, norm) for block in normed for norm in block.every_norm]
        for block, norm in found:
            if norm.turn < 0:
                what = f"a norm of it is no module, but the operation {norm.name!r} of the block's own code"
                raise self.error(block, what, "Choose other blocks, or leave the norms alone")
        return found

    def unseen(self, what: str) -> str:
        """What cannot be seen of its attention, and why the library's interface does not show it."""
        return (
            f"{what} (the library's attention interface is not used: {self.unowned})"
            if self.unowned
            else what
        )

    @property
    def signature(self) -> str:
        """The blocks' signatures; each once, in the order of first appearance."""
        return ", ".join(dict.fromkeys(b.signature for b in self.blocks))


def decodes(structure: Structure) -> bool:
    """Whether the stack is the decoder of an encoder-decoder: it attends to another stream."""
    return any(branch.kind == "cross" for block in structure.blocks for branch in block.branches)


def form(shape: tuple[int, ...], feature_axis: int) -> tuple[int, int]:
    """(axes, features) of a tensor, by which the adds of a stream are told from others."""
    there = -len(shape) <= feature_axis < len(shape)
    return len(shape), shape[feature_axis] if there else 0


def is_attention_op(op: str, shape: tuple[int, ...]) -> bool:
    """Whether an operation makes or applies attention patterns (routers have two axes only)."""
    return op == SDPA or (op == "softmax" and len(shape) >= 3)
