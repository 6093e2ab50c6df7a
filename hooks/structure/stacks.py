"""Find the stacks of blocks of a model in one observed forward pass.

No module, class or config name of a family is consulted. A stream is followed back from the last
residual add of the pass; the modules whose repeated calls hold these adds are the blocks. What is
left over is searched again, so that encoders, decoders and towers are all found.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from rc_probe.hooks.errors import RcProbeError

from .blocks import read_block
from .refusals import no_blocks, past_hooks, places
from .side_by_side import UnclearAxesError, read_side_by_side
from .structure import REPORT, Candidate, CandidateBlock, is_attention_op
from .tape import PRODUCTS, Call, Node, Tape


def read_stacks(tape: Tape, model: nn.Module, batch: int, named: str | None = None) -> list[Candidate]:
    """The stacks of `model` on a tape of one forward pass with `batch` samples, first in time first.

    `named` is a pattern of module names (`encoder.layer.*`, a star for one part of the name): the
    blocks of the one stack to read.

    Raises RcProbeError when no stream of residual adds is found, or when the adds are not held by
    repeated calls of a module.
    """
    adds = [node for node in tape.nodes if node.skip >= 0]
    if not adds and (several := read_side_by_side(tape, [], model, batch)):
        return [several[0]]
    if not adds:
        raise past_hooks(tape) or no_blocks(tape, [])
    if named:
        return [_read_stack(tape, _named_calls(tape, adds, named), model, batch)]
    found: dict[int, Candidate] = {}  # by the call of the last block
    read: dict[int, set[int]] = {}  # the calls of its blocks
    failed: list[RcProbeError] = []
    lost: list[tuple[set[int], RcProbeError]] = []  # blocks that were found and could not be read
    while adds:
        spine = _spine(adds, _end(tape, adds))
        gone = {node.index for node in spine}
        calls, stack = _read_around(tape, adds, spine, model, batch)
        if isinstance(stack, Candidate):
            found[max(calls)], read[max(calls)] = stack, calls
            gone |= {node.index for node in adds for c in calls if _inside(node, tape.calls[c])}
        else:
            failed.append(stack)
            if calls:
                lost.append((calls, stack))
        adds = [node for node in adds if node.index not in gone]
    for calls_lost, why in lost:  # a stage that could not be read: the others are not the stack
        kinds = {type(tape.calls[c].module) for c in calls_lost}
        if any(
            calls_read != calls_lost and type(tape.calls[c].module) in kinds for c, calls_read in read.items()
        ):
            raise why
        for last, calls_read in read.items():  # nor are skips inside its blocks
            if all(_within(tape, call, calls_lost) for call in calls_read):
                found.pop(last, None)
    if not found:
        raise past_hooks(tape) or failed[0]
    return _named_apart([found[last] for last in sorted(found)], failed)


def _read_around(
    tape: Tape, adds: list[Node], spine: list[Node], model: nn.Module, batch: int
) -> tuple[set[int], Candidate | RcProbeError]:
    """The calls of the blocks that hold the spine, as far as they are found, and their stack, or why it cannot be read."""
    try:
        calls = _all_calls(tape, adds, spine, model)
    except RcProbeError as error:
        several = read_side_by_side(tape, spine, model, batch)
        return ({call.index for call in several[1]}, several[0]) if several else (set(), error)
    try:
        return set(calls), _read_stack(tape, calls, model, batch)
    except UnclearAxesError:  # other inputs tell them apart
        raise
    except RcProbeError as error:
        return set(calls), error


def _within(tape: Tape, call: int, others: set[int]) -> bool:
    """Whether a call was made inside one of the others."""
    return any(outer in others for outer in _stack(tape, call)[1:])


def _end(tape: Tape, adds: list[Node]) -> Node:
    """The last add of a stream: of the one that an output of the model carries, if there is one."""
    carried = inside = 0
    for n in tape.calls[0].outputs.values():
        carried |= tape.nodes[n].carried
    for node in adds:
        inside |= node.carried & ~node.bit
    ends = [node for node in reversed(adds) if not node.bit & inside]
    return next((node for node in ends if node.bit & carried), ends[0])


def _named_apart(found: list[Candidate], failed: list[RcProbeError]) -> list[Candidate]:
    """Each stack with the names of the others; modules that run again are another stack, `name#2`."""
    plain = [stack.name for stack in found]
    times = [plain[: i + 1].count(name) for i, name in enumerate(plain)]
    names = [name if n == 1 else f"{name}#{n}" for name, n in zip(plain, times, strict=True)]
    refused = tuple(map(str, failed))
    return [
        replace(stack, name=name, others=(*names[:i], *names[i + 1 :]), refused=refused)
        for i, (stack, name) in enumerate(zip(found, names, strict=True))
    ]


def _all_calls(tape: Tape, adds: list[Node], spine: list[Node], model: nn.Module) -> dict[int, list[Node]]:
    """The block calls that hold the spine, and those of the stages before it."""
    calls = _block_calls(tape, spine, model)
    while earlier := _earlier_stage(tape, adds, calls, model):
        calls = {**earlier, **calls}
    return calls


def _named_calls(tape: Tape, adds: list[Node], pattern: str) -> dict[int, list[Node]]:
    """The calls of the modules that the user names, with the residual adds of their stream."""
    parts = pattern.split(".")
    chosen = [
        call
        for call in tape.calls
        if len(call.name.split(".")) == len(parts)
        and all(fnmatchcase(name, part) for name, part in zip(call.name.split("."), parts, strict=True))
    ]
    where = f"{type(tape.model).__name__}, --blocks {pattern}"
    if not chosen:
        names = {name for name, _ in tape.model.named_modules() if name.rpartition(".")[2].isdecimal()}
        what = "no module of this name ran"
        raise RcProbeError(what, where=where, todo=f"Modules in lists are {_some(sorted(names))}")
    inside = [node for node in adds if any(_inside(node, call) for call in chosen)]
    spine = _spine(inside, inside[-1]) if inside else []
    if spine:
        last, first = spine[-1], chosen[0].first
        same = [n for n in adds if n.index >= first and (n.bit & last.carried or last.bit & n.carried)]
        if outside := [n for n in same if not any(_inside(n, call) for call in chosen)]:
            what = f"the stream has {len(outside)} adds outside of these blocks ({places(outside)})"
            raise RcProbeError(what, where=where, todo="Name all the blocks that add to it")
    calls = {call.index: [node for node in spine if _inside(node, call)] for call in chosen}
    empty = [tape.calls[c].name for c, nodes in calls.items() if not nodes]
    if empty:
        why = no_blocks(tape, _spine(adds, _end(tape, adds))).what if len(empty) == len(calls) else ""
        what = f"no add of the stream was found in {_some(empty)}" + (why and f": {why}")
        raise RcProbeError(what, where=where, todo="Name the modules that add their branches to one stream")
    return calls


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def _inside(node: Node, call: Call) -> bool:
    return call.first <= node.index <= call.last


def _read_stack(tape: Tape, calls: dict[int, list[Node]], model: nn.Module, batch: int) -> Candidate:
    blocks = [
        read_block(tape, tape.calls[call], junctions, index, batch)
        for index, (call, junctions) in enumerate(calls.items())
    ]
    _refuse_second_streams(tape, [tape.calls[c] for c in calls], blocks, model)
    once = [
        call for call in tape.calls if not any(c is not call and c.module is call.module for c in tape.calls)
    ]
    inside = [set(_stack(tape, c)) for c in calls]
    around = [c.name for c in once if c.index not in calls and all(c.index in stack for stack in inside)]
    holders, first = {c.index for c in once if c.name in around}, tape.calls[min(calls)].first
    before = tuple(c.name for c in once if c.parent in holders and c.first <= c.last < first)
    name, owner = _shared_path([b.name for b in blocks]), weakref.ref(model)
    return Candidate(
        name, owner, tuple(blocks), tuple(around) or ("",), before, others=(), refused=(), unowned=""
    )


def _shared_path(names: list[str]) -> str:
    """The parts that all names begin with; for one module that is called again and again, its list's name."""
    shared = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    if len(set(names)) == 1 and shared[-1].isdecimal():
        shared.pop()
    return ".".join(shared) or "+".join(dict.fromkeys(name.split(".")[0] for name in names))


def _refuse_second_streams(
    tape: Tape, calls: list[Call], blocks: list[CandidateBlock], model: nn.Module
) -> None:
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


def _spine(adds: list[Node], end: Node) -> list[Node]:
    """Residual adds on the chain back from `end`, first in time first."""
    return [node for node in adds if node.bit & end.carried]


def _earlier_stage(
    tape: Tape, adds: list[Node], calls: dict[int, list[Node]], model: nn.Module
) -> dict[int, list[Node]]:
    """Blocks of the same class before the first, from whose output its input was computed (Swin)."""
    first = tape.calls[min(calls)]
    before = [node for node in adds if node.index < first.first]
    if not before:
        return {}
    try:
        found = _block_calls(tape, _spine(before, before[-1]), model)
    except RcProbeError:  # adds of something else
        return {}
    last = tape.calls[max(found)]
    entries = [n for n in first.args.values() if tape.nodes[n].bit & calls[min(calls)][0].carried]
    follows = (
        any(tape.nodes[max(entries)].above >> n & 1 for n in last.outputs.values()) if entries else False
    )
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
    groupings = [g for g in groupings if (len(g) > 1 or one or _alone(tape, g)) and _whole(tape, g)]
    # A wrapper around every branch repeats, too; a block is what mixes tokens each time.
    for grouping in [g for g in groupings if all(_mixes(tape, call) for call in g)] or groupings:
        return grouping
    return _block_calls_by_child(tape, spine, stacks)


def _alone(tape: Tape, grouping: dict[int, list[Node]]) -> bool:
    """Whether the one call is that of the one module in a list: a stack of one block."""
    lists, _, number = tape.calls[min(grouping)].name.rpartition(".")
    holder = tape.model.get_submodule(lists) if number.isdecimal() else None
    return isinstance(holder, nn.ModuleList) and len(holder) == 1


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
        raise no_blocks(tape, every)
    return _group(child, spine)


def _group(holders: list[int], spine: list[Node]) -> dict[int, list[Node]]:
    grouping: dict[int, list[Node]] = {}
    for call, node in zip(holders, spine, strict=True):
        grouping.setdefault(call, []).append(node)
    return grouping
