"""Read one block off the tape: its junctions, branches, norms, attention operations and layout."""

from __future__ import annotations

from torch import nn

from rc_probe.hooks.errors import RcProbeError

from .flow import read_flow
from .refusals import normed_before, not_through
from .side_by_side import stream_axes
from .structure import (
    REPORT,
    AttentionOp,
    CandidateBlock,
    CandidateBranch,
    CandidateJunction,
    NormCall,
    Site,
    form,
    is_attention_op,
)
from .tape import NORMS, PRODUCTS, SDPA, Call, Node, Tape

# State-space models multiply two values of the stream, too, but convolve or sum along the tokens first.
SCANS = {"conv1d", "cumsum", "cumprod"}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d"}


def read_block(tape: Tape, call: Call, spine: list[Node], index: int, batch: int) -> CandidateBlock:
    nodes = tape.nodes[call.first : call.last + 1]
    last = spine[-1]
    where = f"{type(tape.model).__name__}, block {index + 1} ({call.name})"
    entries = [(n, p) for p, n in call.args.items() if tape.nodes[n].bit & spine[0].carried]
    exits = [p for p, n in call.outputs.items() if tape.nodes[n].carried & last.bit]
    if not entries or not exits:
        raise RcProbeError(
            f"the stream of the add at {(spine[0] if not entries else last).where} does not "
            f"{'enter' if not entries else 'leave'} the block as one of its tensors"
            + not_through(tape, call, last if entries else spine[0], entry=not entries),
            where=where,
            todo=f"This block cannot be probed. {REPORT}",
        )
    stream, entry = max(entries, key=lambda pair: pair[0])
    shape = tape.nodes[stream].shape
    axes = stream_axes(tape, call, shape, batch)
    batch_axis = axes[0] if axes else _batch_axis(shape, batch, where)
    turned = _turned(shape, spine)
    features = 1 if turned else _feature_axis(call.module, shape, where)
    inside = -1 if turned else features
    forms = frozenset(form(n.shape, inside) for n in spine)
    adds = [n for n in nodes if n.operands is not None and form(n.shape, inside) in forms]
    ops = [n for n in nodes if is_attention_op(n.op, n.shape)]
    out = tape.nodes[call.outputs[exits[0]]]
    junctions = []
    for i, node in enumerate(spine):
        until = spine[i + 1] if i + 1 < len(spine) else out
        junctions.append(
            CandidateJunction(
                skip=_site(index, adds, node, node.skip, call),
                branches=_branches(tape, index, adds, ops, node, batch, call, stream, spine[:i]),
                norms=_norms_between(tape, call, node.index, until, node),
                where=node.where,
            )
        )
    turns = sum(c.module is call.module for c in tape.calls)
    return CandidateBlock(
        index, call.name, call.turn, turns, tuple(junctions), entry, exits[0], forms, len(adds), len(ops), len(shape),
        shape[features], batch_axis, features, inside, 0, read_flow(tape, call, adds, exits[0]),
        _norms_before(tape, call, stream, spine[0]), _branch_norms(tape, call, stream, spine, out),
        normed_before(tape, call, stream, spine[0]),
        shape[axes[1]] if axes else 1, axes[1] if axes else -1,
    )  # fmt: skip


def _batch_axis(shape: tuple[int, ...], batch: int, where: str) -> int | None:
    axes = [a for a, n in enumerate(shape[:-1]) if n == batch and batch]
    if len(axes) > 1:
        what = f"its stream {shape} has as many tokens as samples, so that they cannot be told apart"
        raise RcProbeError(
            what, where=where, todo="Give inputs whose first axis counts samples, fewer than tokens"
        )
    return axes[0] if axes else None


def _feature_axis(block: nn.Module, shape: tuple[int, ...], where: str) -> int:
    """-1; or 1, where the block's convolutions fit that axis and no other weight of it fits the last one."""
    convolutions = [m for m in block.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    if not any(c.in_channels == shape[1] and c.weight.ndim == len(shape) for c in convolutions):
        return -1
    others = [p for m in block.modules() if m not in convolutions for p in m.parameters(recurse=False)]
    if not any(shape[-1] in p.shape for p in others):
        return 1
    if len(shape) == 3:  # convolutions along the tokens, as in Conformers
        return -1
    what = (
        f"its stream {shape} has weights that fit its second and its last axis: which one are the features?"
    )
    raise RcProbeError(what, where=where, todo="Give images of another size")


def _turned(shape: tuple[int, ...], spine: list[Node]) -> bool:
    """Whether a stream (batch, features, height, width) has its features last at all adds of the block."""
    last = (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape
    return last != shape and all(node.shape == last for node in spine)


def _site(block: int, adds: list[Node], node: Node, operand: int, call: Call) -> Site:
    if node not in adds:
        raise RcProbeError(
            f"the add at {node.where} has another shape than the stream",
            where=f"block {block + 1} ({call.name})",
            todo=f"This block cannot be probed. {REPORT}",
        )
    return Site(block, adds.index(node), operand)


def _branches(
    tape: Tape,
    block: int,
    adds: list[Node],
    ops: list[Node],
    node: Node,
    batch: int,
    call: Call,
    entry: int,
    before: list[Node],
) -> tuple[CandidateBranch, ...]:
    """The branches of a junction: one, or several when the added value is itself a sum of branches.

    `entry` is the node of the stream that enters the block: what another tower made of it before is
    a value from elsewhere. `before`: the block's junctions before this one.
    """
    assert node.operands is not None
    skip = tape.nodes[node.operands[node.skip]]
    found = []
    for add, operand in _split_sum(tape, adds, node, 1 - node.skip, skip.carried):
        assert add.operands is not None
        above = tape.nodes[add.operands[operand]].above
        inner = above & ~skip.above
        mine = [AttentionOp(i, op.op, _heads(tape, op, batch)) for i, op in enumerate(ops) if op.bit & inner]
        site = _site(block, adds, add, operand, call)
        nodes = [node for node in tape.nodes[call.first : call.last + 1] if node.bit & inner]
        own, outside = _products(tape, nodes, skip.carried >> entry << entry)
        own = own and (bool(mine) or not any(node.op in SCANS for node in nodes))
        convolves = any(node.op in CONVOLUTIONS for node in nodes)
        nested = _nested(nodes, inner, call)
        reads = max((i for i, earlier in enumerate(before) if earlier.bit & above), default=-1)
        source = _source(tape, tape.nodes[add.operands[operand]], call)
        found.append(CandidateBranch(site, tuple(mine), own, outside, convolves, nested, reads, source))
    return tuple(found)


def _source(tape: Tape, value: Node, call: Call) -> str:
    """The module inside the block in which a value was made, by its name there; "" for the block's own code."""
    name = tape.calls[value.call].name if value.call >= 0 else ""
    return name.removeprefix(call.name).removeprefix(".") if value.call != call.index else ""


def _nested(nodes: list[Node], inner: int, call: Call) -> int:
    """How many skips begin and end inside a branch."""
    ends = [n.operands[n.skip] for n in nodes if n.operands is not None and n.skip >= 0]
    return sum(inner >> n & 1 and n >= call.first for n in ends)


def _products(tape: Tape, nodes: list[Node], stream: int) -> tuple[bool, bool]:
    """Whether a branch multiplies two values computed from the stream, or one with a value from elsewhere."""
    own = outside = False
    for node in nodes:
        if node.op in PRODUCTS:
            computed = [tape.nodes[i].far for i in set(node.inputs) if tape.nodes[i].far]
            from_stream = [bool(far & stream) for far in computed]
            own |= sum(from_stream) > 1
            outside |= len(set(from_stream)) > 1
    return own, outside


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


def _norms_before(tape: Tape, call: Call, stream: int, first: Node) -> tuple[NormCall, ...]:
    """Norm modules that the stream itself goes through before the first add of the block (MiniMax); none where others scale it."""
    try:
        return _norms_between(tape, call, max(stream, call.first - 1), first)
    except RcProbeError:  # the proofs say what it is not
        return ()


def _norms_between(
    tape: Tape, call: Call, start: int, until: Node, junction: Node | None = None
) -> tuple[NormCall, ...]:
    """Norm modules on the stream after the node `start`, the add of `junction`, up to the next junction or the end of the block."""
    found: list[NormCall] = []
    chain = [n for n in tape.nodes[start + 1 : until.index + 1] if n.bit & until.carried and n.norm]
    seen: set[int] = set()
    for n in chain:
        if n.call in seen:
            continue
        seen.add(n.call)
        owner = tape.calls[n.call]
        whole = owner.index != call.index and any(until.carried >> o & 1 for o in owner.outputs.values())
        whole = whole and not (
            junction and owner.first <= start <= owner.last
        )  # the add inside: more than a norm
        if not whole and n.op not in NORMS:
            raise RcProbeError(
                f"the stream is scaled by a value computed from it after the add at {junction.where if junction else 'entry'}",
                where=f"{type(tape.model).__name__} ({call.name})",
                todo=f"This block cannot be probed exactly. {REPORT}",
            )
        found.append(_norm_call(tape, call, owner) if whole else NormCall(n.op, -1))
    return tuple(found)


def _norm_call(tape: Tape, call: Call, owner: Call) -> NormCall:
    """The norm that a module called inside the block is, and which of the calls of this module it was."""
    turn = sum(
        c.module is owner.module and c.index < owner.index and c.first >= call.first for c in tape.calls
    )
    return NormCall(owner.name, turn)


def _branch_norms(tape: Tape, call: Call, stream: int, spine: list[Node], out: Node) -> tuple[NormCall, ...]:
    """The norms that branches read the stream through: what they give is the stream but for scale, and does not go on as such.

    A factor that is computed from the stream by weights is a gate, and no norm.
    """
    on_stream = out.carried
    for node in spine:
        on_stream |= node.carried
    found: dict[int, NormCall] = {}
    for n in tape.nodes[call.first : call.last + 1]:
        if not n.norm or on_stream & n.bit or not n.carried >> stream & 1:
            continue
        read = max((node.index for node in spine if n.carried & node.bit), default=stream)
        if n.op not in NORMS and not any(_scale(tape, i, read) for i in n.inputs if i != n.keeps):
            continue
        owner = tape.calls[n.call]
        whole = owner.index != call.index and any(
            tape.nodes[o].carried & n.bit for o in owner.outputs.values()
        )
        found.setdefault(n.call, _norm_call(tape, call, owner) if whole else NormCall(n.op, -1))
    return tuple(found.values())


def _scale(tape: Tape, value: int, stream: int) -> bool:
    """Whether it is computed from this stream, and without weights."""
    node = tape.nodes[value]
    return bool(node.above >> stream & 1) and not node.far >> stream & 1
