"""What of a block is still used once some of its operands are removed: read off the tape."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .structure import Site
from .tape import Call, Node, Place, Tape


@dataclass(frozen=True)
class InnerCall:
    """A module called once inside a block call: the operations first … last of the block, `adds` of stream shape."""

    name: str
    first: int
    last: int
    adds: int


@dataclass(frozen=True)
class Flow:
    """The operations of one block call, numbered from 0.

    inputs: for each operation, those inside the block that it was computed from
    adds: the number of each add of stream shape, by its operation, with what its operands 0 and 1 were
    exit: the operation that gives the block's stream; ends: those whose results leave the block otherwise
    calls: the modules called inside, outer ones first; none that is called twice
    """

    inputs: tuple[tuple[int, ...], ...]
    adds: dict[int, tuple[int, tuple[int, int]]]
    exit: int
    ends: frozenset[int]
    calls: tuple[InnerCall, ...]

    def unused(self, removed: Collection[Site], *, whole: bool = False) -> tuple[InnerCall, ...]:
        """The outermost modules whose results reach what leaves the block through removed operands alone.

        whole: the stream that leaves the block is not its own, as where the block is the identity
        """
        gone = {(site.ordinal, site.operand) for site in removed}
        live: set[int] = set()
        todo = [*self.ends] if whole else [*self.ends, self.exit]
        while todo:
            node = todo.pop()
            if node in live:
                continue
            live.add(node)
            todo += [i for i in self._used(node, gone) if i not in live]
        found: list[InnerCall] = []
        for call in self.calls:
            inside = any(outer.first <= call.first and call.last <= outer.last for outer in found)
            if not inside and not any(node in live for node in range(call.first, call.last + 1)):
                found.append(call)
        return tuple(found)

    def _used(self, node: int, gone: set[tuple[int, int]]) -> list[int]:
        if node not in self.adds:
            return list(self.inputs[node])
        ordinal, operands = self.adds[node]
        return [i for operand, i in enumerate(operands) if i >= 0 and (ordinal, operand) not in gone]


def read_flow(tape: Tape, call: Call, adds: list[Node], exit_path: Place) -> Flow:
    """The flow of a block call; `adds` are its adds of stream shape, in order."""
    first, last = call.first, call.last
    nodes = tape.nodes[first : last + 1]

    def here(i: int) -> int:
        return i - first if first <= i <= last else -1

    numbers = {node.index - first: number for number, node in enumerate(adds)}
    stream = call.outputs[exit_path]
    leaving = {n for path, n in call.outputs.items() if path != exit_path}
    leaving |= {
        i for node in tape.nodes[last + 1 :] for i in node.inputs if i != stream and first <= i <= last
    }
    inner = [c for c in tape.calls[call.index + 1 :] if first <= c.first and c.first <= c.last <= last]
    inner = [c for c in inner if _encloses(tape, call, c)]
    times = [c.module for c in inner]
    return Flow(
        inputs=tuple(tuple(here(i) for i in node.inputs if here(i) >= 0) for node in nodes),
        adds={
            i: (number, (here(nodes[i].operands[0]), here(nodes[i].operands[1])))  # type: ignore[index]
            for i, number in numbers.items()
        },
        exit=here(stream),
        ends=frozenset(here(i) for i in leaving if here(i) >= 0),
        calls=tuple(
            InnerCall(c.name, here(c.first), here(c.last), sum(c.first <= a.index <= c.last for a in adds))
            for c in inner
            if sum(m is c.module for m in times) == 1
            and all(c.first <= n <= c.last for n in c.outputs.values())  # hands on nothing that it was given
        ),
    )


def _encloses(tape: Tape, outer: Call, call: Call) -> bool:
    while call.parent >= 0:
        if call.parent == outer.index:
            return True
        call = tape.calls[call.parent]
    return False
