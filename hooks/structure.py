"""The blocks of a model, their junctions and branches, found in one observed forward pass.

No module, class or config name of a family is consulted. The stream is followed back from the last
residual add of the pass; the modules whose repeated calls hold these adds are the blocks.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch import nn

from .errors import RcProbeError
from .tape import NORMS, SDPA, Call, Node, Path, Tape

KIND_LETTER = {"attention": "A", "cross": "X", "mixer": "C", "mlp": "M"}
PRODUCTS = {SDPA, "matmul", "bmm", "baddbmm", "einsum", "__matmul__"}
REPORT = "Report it with the model's config"


@dataclass(frozen=True)
class Site:
    """One operand of a junction's add: block call (from 0), ordinal of the add in it, operand 0 or 1."""

    block: int
    ordinal: int
    operand: int


@dataclass(frozen=True)
class AttentionOp:
    """The how manieth softmax or scaled_dot_product_attention of the block call, and its heads."""

    ordinal: int
    op: str
    heads: int


@dataclass
class Branch:
    """What a block adds to the stream. `kind` is attention, cross, mixer or mlp; proved at attach."""

    site: Site
    kind: str = "?"
    ops: tuple[AttentionOp, ...] = ()
    has_product: bool = False  # multiplies two values computed from the stream: attention-like
    outside: bool = False  # multiplies one with a value computed elsewhere: cross-attention


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
    """One call of a repeated layer: `turn` is the how manieth call of its module in a forward pass."""

    index: int
    name: str
    turn: int
    junctions: list[Junction]
    entry: Path  # where the stream is in (args, kwargs)
    exit: Path  # where the stream is in the output
    forms: frozenset[tuple[int, int]]  # (axes, last axis) of the adds at its junctions
    adds: int  # how many adds of these forms one call makes
    attention_ops: int  # how many softmax / attention calls of three or more axes one call makes
    ndim: int
    dim: int
    batch_axis: int | None

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
    """The blocks of one stack of a model, in the order in which they are called."""

    owner: weakref.ref[nn.Module]  # weak, so that a cached structure keeps no model alive
    blocks: list[Block]
    ancestors: list[str]  # modules whose call contains all block calls, once per forward pass
    proved: list[str] = field(default_factory=list)

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


def read_structure(tape: Tape, model: nn.Module, batch: int) -> Structure:
    """Find the blocks of `model` on a tape of one forward pass with `batch` sequences.

    Raises RcProbeError when no stream of residual adds is found, or when the adds are not held by
    repeated calls of a module.
    """
    adds = [node for node in tape.nodes if node.skip >= 0]
    if not adds:
        raise RcProbeError(
            "no residual adds were found: this does not look like a transformer",
            where=type(model).__name__,
            todo="rc-probe needs a stack of blocks whose branches are added to a stream",
        )
    calls = _block_calls(tape, _spine(tape, adds), model)
    while earlier := _earlier_stage(tape, adds, calls, model):
        calls = {**earlier, **calls}
    blocks = [
        _read_block(tape, tape.calls[call], junctions, index, batch)
        for index, (call, junctions) in enumerate(calls.items())
    ]
    _refuse_second_streams(tape, [tape.calls[c] for c in calls], blocks, model)
    once = [
        call for call in tape.calls if not any(c is not call and c.module is call.module for c in tape.calls)
    ]
    inside = [set(_stack(tape, c)) for c in calls]
    ancestors = [c.name for c in once if c.index not in calls and all(c.index in stack for stack in inside)]
    return Structure(weakref.ref(model), blocks, ancestors or [""])


def _refuse_second_streams(tape: Tape, calls: list[Call], blocks: list[Block], model: nn.Module) -> None:
    """Another value handed from block to block that the stream depends on (Reformer's reversible pair)."""
    for block, before, call in zip(blocks[1:], calls, calls[1:], strict=False):
        stream = tape.nodes[call.args[block.entry]]
        out = tape.nodes[call.outputs[block.exit]]
        handed = sum({1 << n for n in before.outputs.values() if not stream.carried >> n & 1})
        for node in (tape.nodes[n] for n in call.args.values()):
            if (
                node is not stream
                and node.shape == stream.shape
                and node.above & handed
                and out.above & node.bit
            ):
                raise RcProbeError(
                    "a second stream is handed from block to block and flows into the first",
                    where=f"{type(model).__name__}, block {block.index + 1} ({block.name})",
                    todo=f"Models of coupled streams cannot be probed. {REPORT}",
                )


def _spine(tape: Tape, adds: list[Node]) -> list[Node]:
    """Residual adds on the chain back from the last one, first in time first."""
    return [node for node in adds if node.bit & adds[-1].carried]


def _earlier_stage(
    tape: Tape, adds: list[Node], calls: dict[int, list[Node]], model: nn.Module
) -> dict[int, list[Node]]:
    """Blocks of the same class before the first, from whose output its input was computed (Swin)."""
    first = tape.calls[min(calls)]
    before = [node for node in adds if node.index < first.first]
    if not before:
        return {}
    found = _block_calls(tape, _spine(tape, before), model)
    last = tape.calls[max(found)]
    entry = max(n for n in first.args.values() if tape.nodes[n].bit & calls[min(calls)][0].carried)
    follows = any(tape.nodes[entry].above >> n & 1 for n in last.outputs.values())
    return found if follows and type(last.module) is type(first.module) else {}


def _stack(tape: Tape, call: int) -> list[int]:
    """Calls that enclose `call`, itself first."""
    found = []
    while call >= 0:
        found.append(call)
        call = tape.calls[call].parent
    return found


def _block_calls(tape: Tape, spine: list[Node], model: nn.Module) -> dict[int, list[Node]]:
    """The block calls, in order, with the junctions that each holds."""
    stacks = [_stack(tape, node.call) for node in spine]
    kinds = [{type(tape.calls[c].module) for c in stack} for stack in stacks]
    common = set.intersection(*kinds)
    one = getattr(getattr(model, "config", None), "num_hidden_layers", None) == 1
    groupings = []
    for kind in dict.fromkeys(type(tape.calls[c].module) for c in stacks[-1]):  # innermost first
        if kind in common:
            holder = [next(c for c in stack if type(tape.calls[c].module) is kind) for stack in stacks]
            groupings.append(_group(holder, spine))
    groupings = [g for g in groupings if (len(g) > 1 or one) and _whole(tape, g)]
    # A wrapper around every branch repeats, too; a block is what mixes tokens each time.
    for grouping in [g for g in groupings if all(_mixes(tape, call) for call in g)] or groupings:
        return grouping
    return _block_calls_by_child(tape, spine, stacks)


def _whole(tape: Tape, grouping: dict[int, list[Node]]) -> bool:
    """Whether the calls hold whole branches: none gets a value that was computed from its stream."""
    for call, junctions in grouping.items():
        args = set(tape.calls[call].args.values())
        stream = max((n for n in args if tape.nodes[n].bit & junctions[0].carried), default=-1)
        if stream < 0 or any(tape.nodes[n].far >> stream & 1 for n in args):
            return False
    return True


def _mixes(tape: Tape, call: int) -> bool:
    """Whether the call holds an attention operation or a product of two computed values."""
    nodes = tape.nodes[tape.calls[call].first : tape.calls[call].last + 1]
    return any(is_attention_op(n.op, n.shape) or (n.op in PRODUCTS and len(set(n.inputs)) > 1) for n in nodes)


def _block_calls_by_child(tape: Tape, spine: list[Node], stacks: list[list[int]]) -> dict[int, list[Node]]:
    """Blocks of several classes (hybrids): the children of the innermost call that holds every add."""
    shared = set.intersection(*(set(s) for s in stacks))
    top = next(c for c in stacks[-1] if c in shared)
    child = [s[s.index(top) - 1] if s.index(top) > 0 else -1 for s in stacks]
    every = spine
    while child and child[0] < 0:  # an add before the first block, such as positions by convolution
        child, spine = child[1:], spine[1:]
    while child and child[-1] < 0:
        child, spine = child[:-1], spine[:-1]
    if not child or -1 in child:
        raise RcProbeError(
            f"its residual adds ({_places(every)}) are not held by modules that repeat, "
            "one call for each block: this does not look like a transformer",
            where=type(tape.model).__name__,
            todo=f"rc-probe needs a stack of blocks whose branches are added to a stream. {REPORT}",
        )
    return _group(child, spine)


def _places(nodes: list[Node]) -> str:
    return ", ".join(dict.fromkeys(node.where for node in nodes))


def _group(holders: list[int], spine: list[Node]) -> dict[int, list[Node]]:
    grouping: dict[int, list[Node]] = {}
    for call, node in zip(holders, spine, strict=True):
        grouping.setdefault(call, []).append(node)
    return grouping


def _read_block(tape: Tape, call: Call, spine: list[Node], index: int, batch: int) -> Block:
    nodes = tape.nodes[call.first : call.last + 1]
    last = spine[-1]
    entries = [(n, p) for p, n in call.args.items() if tape.nodes[n].bit & spine[0].carried]
    exits = [p for p, n in call.outputs.items() if tape.nodes[n].carried & last.bit]
    if not entries or not exits:
        raise RcProbeError(
            f"the stream of the add at {last.where} does not {'enter' if not entries else 'leave'} the block "
            "as one of its tensors",
            where=f"{type(tape.model).__name__}, block {index + 1} ({call.name})",
            todo=f"This block cannot be probed. {REPORT}",
        )
    stream, entry = max(entries, key=lambda pair: pair[0])
    shape = tape.nodes[stream].shape
    forms = frozenset((len(n.shape), n.shape[-1]) for n in spine)
    adds = [n for n in nodes if n.operands is not None and (len(n.shape), n.shape[-1]) in forms]
    ops = [n for n in nodes if is_attention_op(n.op, n.shape)]
    out = tape.nodes[call.outputs[exits[0]]]
    junctions = []
    for i, node in enumerate(spine):
        until = spine[i + 1] if i + 1 < len(spine) else out
        junctions.append(
            Junction(
                skip=_site(index, adds, node, node.skip, call),
                branches=_branches(tape, index, adds, ops, node, batch, call),
                norms=_norms_between(tape, call, node, until),
                where=node.where,
            )
        )
    batch_axes = [a for a, n in enumerate(shape[:-1]) if n == batch]
    if len(batch_axes) > 1:
        raise RcProbeError(
            f"its stream {shape} has as many tokens as samples, so that they cannot be told apart",
            where=f"{type(tape.model).__name__}, block {index + 1} ({call.name})",
            todo="Give inputs whose first axis counts samples, fewer than tokens",
        )
    batch_axis = batch_axes[0] if batch_axes else None
    return Block(
        index, call.name, call.turn, junctions, entry, exits[0], forms, len(adds), len(ops), len(shape), shape[-1],
        batch_axis,
    )  # fmt: skip


def is_attention_op(op: str, shape: tuple[int, ...]) -> bool:
    """Whether an operation makes or applies attention patterns (routers have two axes only)."""
    return op == SDPA or (op == "softmax" and len(shape) >= 3)


def _site(block: int, adds: list[Node], node: Node, operand: int, call: Call) -> Site:
    if node not in adds:
        raise RcProbeError(
            f"the add at {node.where} has another shape than the stream",
            where=f"block {block + 1} ({call.name})",
            todo=f"This block cannot be probed. {REPORT}",
        )
    return Site(block, adds.index(node), operand)


def _branches(
    tape: Tape, block: int, adds: list[Node], ops: list[Node], node: Node, batch: int, call: Call
) -> list[Branch]:
    """The branches of a junction: one, or several when the added value is itself a sum of branches."""
    assert node.operands is not None
    skip = tape.nodes[node.operands[node.skip]]
    found = []
    for add, operand in _split_sum(tape, adds, node, 1 - node.skip, skip.carried):
        assert add.operands is not None
        value = tape.nodes[add.operands[operand]]
        inner = value.above & ~skip.above
        mine = [AttentionOp(i, op.op, _heads(tape, op, batch)) for i, op in enumerate(ops) if op.bit & inner]
        products = [
            {
                bool(tape.nodes[i].far & skip.carried): tape.nodes[i]
                for i in set(n.inputs)
                if tape.nodes[i].far
            }
            for n in tape.nodes[call.first : call.last + 1]
            if n.bit & inner and n.op in PRODUCTS and len(set(n.inputs)) > 1
        ]
        product = any(
            sum(bool(tape.nodes[i].far & skip.carried) for i in set(n.inputs)) > 1
            for n in tape.nodes[call.first : call.last + 1]
            if n.bit & inner and n.op in PRODUCTS
        )
        found.append(
            Branch(
                _site(block, adds, add, operand, call),
                ops=tuple(mine),
                has_product=product,
                outside=any(len(sides) == 2 for sides in products),
            )
        )
    return found


def _split_sum(tape: Tape, adds: list[Node], node: Node, operand: int, skip: int) -> list[tuple[Node, int]]:
    """Follow operand `operand` of the add back to an add of two branches, if it is one."""
    assert node.operands is not None
    value = tape.nodes[node.operands[operand]]
    while value.keeps >= 0 and not value.norm and value.operands is None:
        value = tape.nodes[value.keeps]
    if value.operands is not None and value.skip < 0 and value in adds and value.call == node.call:
        parts = [tape.nodes[i] for i in value.operands]
        if all(p.far & skip and p.shape == value.shape for p in parts):
            return [pair for i in (0, 1) for pair in _split_sum(tape, adds, value, i, skip)]
    return [(node, operand)]


def _heads(tape: Tape, op: Node, batch: int) -> int:
    """Heads of an attention op: axis 1 of (B, H, T, S); folded into the batch in (B H, T, S)."""
    shape = tape.nodes[op.inputs[0]].shape if op.op == SDPA else op.shape
    if len(shape) == 4:
        return shape[1]
    return max(shape[0] // batch, 1)


def _norms_between(tape: Tape, call: Call, node: Node, until: Node) -> list[NormAfter]:
    """Norm modules on the stream after `node`, up to the next junction or the end of the block."""
    found: list[NormAfter] = []
    chain = [n for n in tape.nodes[node.index + 1 : until.index + 1] if n.bit & until.carried and n.norm]
    seen: set[int] = set()
    for n in chain:
        if n.call in seen:
            continue
        seen.add(n.call)
        owner = tape.calls[n.call]
        whole = owner.index != call.index and any(until.carried >> o & 1 for o in owner.outputs.values())
        whole = (
            whole and not owner.first <= node.index <= owner.last
        )  # the add itself inside: more than a norm
        if not whole and n.op not in NORMS:
            raise RcProbeError(
                f"the stream is scaled by a value computed from it after the add at {node.where}",
                where=f"{type(tape.model).__name__} ({call.name})",
                todo=f"This block cannot be probed exactly. {REPORT}",
            )
        turn = sum(
            c.module is owner.module and c.index < owner.index and c.first >= call.first for c in tape.calls
        )
        found.append(NormAfter(owner.name, turn) if whole else NormAfter(n.op, -1))
    return found
