"""What a stack of blocks is made of: blocks, their junctions and branches, and the places of edits."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from rc_probe.hooks.errors import RcProbeError

from .tape import SDPA, Path

if TYPE_CHECKING:
    from .flow import Flow

KIND_LETTER = {"attention": "A", "cross": "X", "mixer": "C", "mlp": "M"}
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
    """An attention op of a block call: by what it is owned, the how manieth of these it is, its heads.

    `via` is `interface`, where its output is (batch, tokens, heads, dim), or what is intercepted:
    `scaled_dot_product_attention`, (batch, heads, tokens, dim), or `softmax`, whose output is the
    pattern (batch, heads, queries, keys). The heads of these two may be folded into the batch.
    """

    ordinal: int
    via: str
    heads: int  # of the queries; 0 where the layout could not be proved


@dataclass
class Branch:
    """What a block adds to the stream. `kind` is attention, cross, mixer or mlp; proved at attach."""

    site: Site
    kind: str = "?"
    ops: tuple[AttentionOp, ...] = ()
    has_product: bool = False  # multiplies two values computed from the stream, and is no scan
    outside: bool = False  # multiplies one with a value computed elsewhere: cross-attention
    convolves: bool = False  # has a convolution or pooling, which may move little between tokens
    inner: int = 0  # residual adds inside the branch, which stay as they are
    reads: int = -1  # the last junction of the block whose sum it is computed from; -1: what enters the block

    @property
    def attends(self) -> bool:
        """Whether it weighs values of the stream by values of the stream: if it mixes tokens, it is attention."""
        return self.has_product or any(op.via in {SDPA, INTERFACE} for op in self.ops)


@dataclass
class NormAfter:
    """A norm through which the stream itself goes after a junction (post-LN).

    `turn` counts the calls of the module within one block call; it is -1 when the block calls the
    norm as a function, so that there is no module to bypass.
    """

    name: str
    turn: int


@dataclass
class Junction:
    """The add where a skip and its branches meet. Parallel blocks have several branches in one."""

    skip: Site
    branches: list[Branch]
    norms: list[NormAfter]
    where: str  # file:line of the add


@dataclass
class Block:
    """One call of a repeated layer: `turn` is the how manieth of the `turns` calls of its module in a pass."""

    index: int
    name: str
    turn: int
    turns: int
    junctions: list[Junction]
    entry: Path  # where the stream is in (args, kwargs)
    exit: Path  # where the stream is in the output
    forms: frozenset[tuple[int, int]]  # (axes, features) of the adds at its junctions
    adds: int  # how many adds of these forms one call makes
    attention_ops: int  # how many softmax / attention calls of three or more axes one call makes
    ndim: int
    dim: int
    batch_axis: int | None
    feature_axis: int = -1  # 1 in convolutional blocks, whose stream is (batch, features, height, width)
    scaled: bool = False  # its skips carry the stream times a fixed factor
    flow: Flow | None = None  # what of it is used for what
    routed: int = 0  # how many calls of the library's attention interface one call makes

    @property
    def signature(self) -> str:
        """For example `An|Mn` (BERT), `A|M` (GPT-2), `A+M` (GPT-NeoX); n is a norm on the stream."""
        parts = []
        for j in self.junctions:
            letters = sorted((KIND_LETTER.get(b.kind, "?") for b in j.branches), key="AXCM?".index)
            parts.append("+".join(letters) + "n" * len(j.norms))
        return "|".join(parts)

    @property
    def branches(self) -> list[Branch]:
        return [b for j in self.junctions for b in j.branches]


@dataclass
class Structure:
    """The blocks of one stack of a model, in the order in which they are called.

    name: the module path that its blocks share, for example `encoder.layer` or `decoder.block`
    others: names of the model's further stacks; refused: why what looked like one is none
    """

    name: str
    owner: weakref.ref[nn.Module]  # weak, so that a cached structure keeps no model alive
    blocks: list[Block]
    ancestors: list[str]  # modules whose call contains all block calls, once per forward pass
    proved: list[str] = field(default_factory=list)
    before: tuple[
        str, ...
    ] = ()  # modules called once, and done before the first block is called: encoders, embeddings
    others: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    # Proved when paths are first drawn: branches carry nothing past their heads, blocks nothing past these steps.
    heads_alone: bool = False
    steps_alone: set[tuple[tuple[int, int, int], ...]] = field(default_factory=set)

    @property
    def model(self) -> nn.Module:
        model = self.owner()
        if model is None:
            raise RcProbeError("the model that was attached no longer exists", todo="Attach again")
        return model

    def module(self, block: Block) -> nn.Module:
        return self.model.get_submodule(block.name)

    def error(self, block: Block, what: str, todo: str) -> RcProbeError:
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
    def signature(self) -> str:
        """The blocks' signatures; each once, in the order of first appearance."""
        return ", ".join(dict.fromkeys(b.signature for b in self.blocks))


def form(shape: tuple[int, ...], feature_axis: int) -> tuple[int, int]:
    """(axes, features) of a tensor, by which the adds of a stream are told from others."""
    there = -len(shape) <= feature_axis < len(shape)
    return len(shape), shape[feature_axis] if there else 0


def is_attention_op(op: str, shape: tuple[int, ...]) -> bool:
    """Whether an operation makes or applies attention patterns (routers have two axes only)."""
    return op == SDPA or (op == "softmax" and len(shape) >= 3)
