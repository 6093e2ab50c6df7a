"""What of a block is still used once some of its operands are removed: read off the tape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from .structure import Site
from .tape import KEEPS_FIRST, Call, Node, Place, Tape


@dataclass(frozen=True)
class InnerCall:
    """A module called once inside a block call: the operations first … last of the block, `adds` of stream shape.

    closed: what it computes is used outside of it as its output alone (it writes into nothing that it was given)
    """

    name: str
    first: int
    last: int
    adds: int
    closed: bool


@dataclass(frozen=True)
class Flow:
    """The operations of one block call, numbered from 0.

    inputs: for each operation, those inside the block that it was computed from
    adds: of each add of stream shape, in their order, its operation and what its operands 0 and 1 were (-1: not inside)
    exit: the operation that gives the block's stream; ends: those whose results leave the block otherwise
    calls: the modules called inside, outer ones first; none that is called twice
    closed: what is computed inside is used behind the block as what the block returns alone
    """

    inputs: tuple[tuple[int, ...], ...]
    adds: tuple[tuple[int, tuple[int, int]], ...]
    exit: int
    ends: frozenset[int]
    calls: tuple[InnerCall, ...]
    closed: bool

    def unused(self, removed: Collection[Site], *, whole: bool = False) -> tuple[InnerCall, ...]:
        """The outermost modules whose results reach what leaves the block through removed operands alone.

        whole: the stream that leaves the block is not its own, as where the block is the identity
        """
        gone = {(site.ordinal, site.operand) for site in removed}
        adds = {node: (ordinal, operands) for ordinal, (node, operands) in enumerate(self.adds)}
        live: set[int] = set()
        todo = [*self.ends] if whole else [*self.ends, self.exit]
        while todo:
            node = todo.pop()
            if node in live:
                continue
            live.add(node)
            if node in adds:
                ordinal, operands = adds[node]
                todo += [i for k, i in enumerate(operands) if i >= 0 and (ordinal, k) not in gone]
            else:
                todo += self.inputs[node]
        return _outermost(c for c in self.calls if live.isdisjoint(range(c.first, c.last + 1)))

    def before(self, ordinal: int) -> tuple[InnerCall, ...]:
        """The outermost modules that are done before the add number `ordinal`, and give no more than their output."""
        start = self.adds[ordinal][0]
        return _outermost(c for c in self.calls if c.last < start and c.closed)


def _outermost(calls: Iterable[InnerCall]) -> tuple[InnerCall, ...]:
    """Of calls, outer ones first, those that are not inside another of them."""
    found: list[InnerCall] = []
    for call in calls:
        if not any(outer.first <= call.first and call.last <= outer.last for outer in found):
            found.append(call)
    return tuple(found)


def read_flow(tape: Tape, call: Call, adds: list[Node], exit_path: Place) -> Flow:
    """The flow of a block call; `adds` are its adds of stream shape, in order."""
    first, last = call.first, call.last
    nodes = tape.nodes[first : last + 1]

    def here(i: int) -> int:
        return i - first if first <= i <= last else -1

    stream = call.outputs[exit_path]
    later = {i for node in tape.nodes[last + 1 :] for i in node.inputs if first <= i <= last}
    leaving = {n for path, n in call.outputs.items() if path != exit_path} | later - {stream}
    return Flow(
        inputs=tuple(tuple(here(i) for i in node.inputs if here(i) >= 0) for node in nodes),
        adds=tuple((here(n.index), (here(n.operands[0]), here(n.operands[1]))) for n in adds if n.operands),
        exit=here(stream),
        ends=frozenset(here(i) for i in leaving if here(i) >= 0),
        calls=tuple(_inner_calls(tape, call, adds)),
        closed=all(_origin(tape, i) < first for i in later - set(call.outputs.values())),
    )


def _inner_calls(tape: Tape, call: Call, adds: list[Node]) -> Iterator[InnerCall]:
    first, last = call.first, call.last
    last_use = {i: node.index for node in tape.nodes[first:] for i in node.inputs}
    last_use |= dict.fromkeys(call.outputs.values(), len(tape.nodes))
    inner = [c for c in tape.calls[call.index + 1 :] if first <= c.first and c.first <= c.last <= last]
    inner = [c for c in inner if _encloses(tape, call, c)]
    times = Counter(c.module for c in inner)
    for c in inner:
        out = set(c.outputs.values())
        if times[c.module] == 1 and all(
            c.first <= n <= c.last for n in out
        ):  # hands on nothing that it was given
            made = range(c.first, c.last + 1)
            closed = all(last_use.get(n, n) <= c.last or n in out for n in made)
            yield InnerCall(
                c.name, c.first - first, c.last - first, sum(a.index in made for a in adds), closed
            )


def _origin(tape: Tape, i: int) -> int:
    """Of what a view or a cast was made, at the end; many a cast gives the very tensor that it was given."""
    node = tape.nodes[i]
    while node.keeps >= 0 and node.op in KEEPS_FIRST - {"__setitem__", "masked_fill_", "dropout_"}:
        node = tape.nodes[node.keeps]
    return node.index


def _encloses(tape: Tape, outer: Call, call: Call) -> bool:
    while call.parent >= 0:
        if call.parent == outer.index:
            return True
        call = tape.calls[call.parent]
    return False
