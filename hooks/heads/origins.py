"""Where queries, keys, values and heads come from and go to: the modules whose linear maps make them, read off the tape."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import Block, Branch, form
from rc_probe.hooks.structure.tape import HEAVY, KEEPS_FIRST, NORMS, Call, Node, Tape

ROOTS = {"rsqrt", "sqrt", "var", "pow", "norm", "normalize", "rms_norm"}  # of norms written out


@dataclass(frozen=True)
class Place:
    """A module's call: its name in the model, and its turn within the call of the block."""

    name: str
    turn: int


@dataclass(frozen=True)
class Origins:
    """Of one attention op. norm: what the projections read comes from it, None for the stream itself; out: "" and why."""

    query: Place
    key: Place
    value: Place
    out: Place | None
    no_out: str
    norm: str | None


def origins(tape: Tape, block: Block, branch: Branch, nodes: dict[str, int]) -> Origins:
    """nodes: of `query`, `key`, `value` and `out` of the op. RcProbeError, naming the operations, where there is no such module."""
    call = next(c for c in tape.calls if c.name == block.name and c.turn == block.turn)
    stream = max(n for p, n in call.args.items() if p == block.entry)
    found = {
        part: _projection(tape, call, nodes[part], stream, PARTS[part]) for part in ("query", "key", "value")
    }
    norm = _norm(tape, call, found["query"])
    try:
        out: Place | None = _place(tape, call, _output(tape, call, block, branch, nodes["out"]))
        no_out = ""
    except RcProbeError as error:
        out, no_out = None, error.what
    places = {part: _place(tape, call, each) for part, each in found.items()}
    return Origins(**places, out=out, no_out=no_out, norm=norm)


PARTS = {"query": "queries", "key": "keys", "value": "values", "out": "output"}


def _projection(tape: Tape, call: Call, node: int, stream: int, part: str) -> Call:
    """The call inside `call` that makes what `node` was computed from by linear maps of the stream."""
    heavy, norms = _heavy_before(tape, call, node, 1 << stream)
    if not heavy:
        raise RcProbeError(f"no linear map that makes its {part} was seen")
    made = _innermost(tape, heavy)
    if made is None or made.first <= node <= made.last or made.index <= call.index:
        ops = ", ".join(sorted({tape.nodes[n].op for n in heavy}))
        names = ", ".join(dict.fromkeys(_named(tape, call, tape.nodes[n]) for n in heavy))
        raise RcProbeError(f"its {part} are not made by one linear module: by {ops} in {names}")
    if norms:
        names = ", ".join(dict.fromkeys(_named(tape, call, tape.nodes[n]) for n in norms))
        raise RcProbeError(f"its {part} go through a norm behind their projection: {names}")
    return made


def _heavy_before(tape: Tape, call: Call, node: int, stream: int) -> tuple[list[int], list[int]]:
    """The heavy operations that `node` was computed from without others between, and the norms between; of the stream alone."""
    heavy, norms, seen, todo = list[int](), list[int](), set[int](), [node]
    while todo:
        at = tape.nodes[todo.pop()]
        if at.index in seen or at.index < call.first or not at.above & stream:
            continue
        seen.add(at.index)
        if at.op in HEAVY:
            heavy.append(at.index)
            continue
        if at.op in NORMS | ROOTS:
            norms.append(at.index)
        todo += at.inputs
    return sorted(heavy), sorted(norms)


def _innermost(tape: Tape, nodes: Iterable[int]) -> Call | None:
    """The innermost call that all of these were made in."""
    chains = [_chain(tape, tape.nodes[n]) for n in nodes]
    return next((c for c in chains[0] if all(c in chain for chain in chains)), None)


def _chain(tape: Tape, node: Node) -> list[Call]:
    """The calls that a node was made in, the innermost first."""
    found, at = list[Call](), node.call
    while at >= 0:
        found.append(tape.calls[at])
        at = tape.calls[at].parent
    return found


def _named(tape: Tape, call: Call, node: Node) -> str:
    owner = tape.calls[node.call] if node.call >= 0 else call
    inside = owner.name.removeprefix(call.name).removeprefix(".")
    return f"{type(owner.module).__name__} ({inside})" if inside else f"{node.op} in the block's own code"


def _output(tape: Tape, call: Call, block: Block, branch: Branch, out: int) -> Call:
    """The call that maps the op's output back to the stream."""
    nodes = tape.nodes[call.first : call.last + 1]
    adds = [n for n in nodes if n.operands is not None and form(n.shape, block.add_axis) in block.forms]
    add = adds[branch.site.ordinal]
    assert add.operands is not None
    heavy, _ = _heavy_before(tape, call, add.operands[branch.site.operand], 1 << out)
    made = _innermost(tape, heavy) if heavy else None
    if made is None or made.first <= out or made.index <= call.index:
        raise RcProbeError("no one linear module maps its heads back to the stream")
    return made


def _norm(tape: Tape, call: Call, projection: Call) -> str | None:
    """The module inside the block whose output the projection reads, moved at most."""
    node = tape.nodes[next(iter(projection.args.values()))]
    while True:
        made = [
            c for c in tape.calls[call.index + 1 :]
            if call.first <= c.first and c.last < projection.first and node.index in c.outputs.values() and len(c.args) == 1
        ]  # fmt: skip
        if made:
            return made[-1].name
        if node.op not in KEEPS_FIRST or node.keeps < call.first:
            return None
        node = tape.nodes[node.keeps]


def _place(tape: Tape, call: Call, made: Call) -> Place:
    """A call of a module within a block's, as it is found again in another pass."""
    inside = [
        c for c in tape.calls if c.module is made.module and call.first <= c.first and c.index > call.index
    ]
    inside = [c for c in inside if c.first <= call.last]
    return Place(made.name, inside.index(made))
