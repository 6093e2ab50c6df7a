"""Several streams side by side, as hyper-connections and AltUp have them: blocks that hand on one tensor of all.

Where blocks mix the streams, and add what they read from a mixture, no skip carries one of them as it is: there are no
junctions to edit. What is handed on from block to block is there all the same, and can be measured.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import nn

from rc_probe.hooks.errors import RcProbeError

from .flow import read_flow
from .structure import Candidate, CandidateBlock
from .tape import Call, Node, Place, Tape

NDIM = 4  # samples, tokens, streams and features, in whatever order the first three come
MEASURED = (
    "rc-probe measures each stream (attach, and the curves of a run); in such a model nothing can be ablated, "
    "exchanged or told apart by paths"
)


class UnclearAxesError(RcProbeError):
    """Two axes of a tensor of streams are of one size: other inputs tell them apart."""


def mixed_streams(count: int, model: nn.Module) -> RcProbeError:
    """The refusal of what needs junctions, where blocks mix several streams."""
    what = f"its blocks hand on {count} streams side by side and mix them, and no skip carries one of them as it is"
    return RcProbeError(what, where=type(model).__name__, todo=MEASURED)


def streams_side_by_side(tape: Tape, spine: Sequence[Node]) -> int:
    """How many streams the modules of a list hand on in one tensor, around the adds `spine` if there are any; else 0."""
    calls = [c for c in _in_lists(tape) if not spine or any(c.first <= n.index <= c.last for n in spine)]
    return next((shape[axes[0]] for call in calls for shape, axes in _handed(tape, call)), 0)


def read_side_by_side(
    tape: Tape, spine: Sequence[Node], model: nn.Module, batch: int
) -> tuple[Candidate, list[Call]] | None:
    """The stack whose blocks hand on several streams in one tensor, around the adds `spine` if there are any, and their calls.

    Raises UnclearAxesError where the sizes do not tell which axis counts samples, tokens or streams, and RcProbeError
    where the streams change between blocks.
    """
    calls = _calls(tape, spine)
    if not calls:
        return None
    shape, axes = _handed(tape, calls[0])[0]
    where, fits = type(model).__name__, _fits(tape, shape, axes, batch)
    if len(fits) != 1:
        raise _unclear(shape, where)
    samples, stream = fits[0]
    places = [_places(tape, call, shape) for call in calls]
    for before, call, (_, out), (entry, _) in zip(calls, calls[1:], places, places[1:], strict=False):
        if before.outputs[out] != call.args[entry]:
            raise RcProbeError(
                f"its blocks hand on {shape[stream]} streams side by side, and what enters {call.name} is not what {before.name} "
                "returned",
                where=where,
                todo="Streams that change between blocks cannot be measured",
            )
    blocks = [
        CandidateBlock(
            index, call.name, call.turn, sum(c.module is call.module for c in tape.calls), (), entry, out, frozenset(), 0, 0,
            NDIM, shape[-1], samples, -1, -1, 0, read_flow(tape, call, [], out), (), (), "", shape[stream], stream,
        )
        for index, (call, (entry, out)) in enumerate(zip(calls, places, strict=True))
    ]  # fmt: skip
    inside = [_around(tape, call) for call in calls]
    once = [c for c in tape.calls if sum(other.module is c.module for other in tape.calls) == 1]
    around = [c.name for c in once if all(c.index in stack for stack in inside)]
    stack = Candidate(
        list_of(calls[0].name), weakref.ref(model), tuple(blocks), tuple(around) or ("",), (), others=(), refused=(), unowned=""
    )  # fmt: skip
    return stack, calls


def stream_axes(tape: Tape, call: Call, shape: tuple[int, ...], batch: int) -> tuple[int, int] | None:
    """The axes of samples and of streams, where a block that hands on tensors of this shape hands on several; else None.

    Raises UnclearAxesError where more than one choice fits.
    """
    axes = dict(_handed(tape, call)).get(shape, [])
    fits = _fits(tape, shape, axes, batch)
    if len(fits) > 1:
        raise _unclear(shape, type(tape.model).__name__)
    return fits[0] if fits else None


def list_of(name: str) -> str:
    """`encoder.layers` of `encoder.layers.0`, "" of other names."""
    lists, _, number = name.rpartition(".")
    return lists if number.isdecimal() else ""


def _in_lists(tape: Tape) -> list[Call]:
    return [call for call in tape.calls if list_of(call.name)]


def _calls(tape: Tape, spine: Sequence[Node]) -> list[Call]:
    """The calls of the modules of one list, all of which hand on streams of the same shape."""
    lists: dict[str, list[Call]] = {}
    for call in _in_lists(tape):
        lists.setdefault(list_of(call.name), []).append(call)
    for calls in lists.values():
        found = [[shape for shape, _ in _handed(tape, call)][:1] for call in calls]
        if not found[0] or any(one != found[0] for one in found):
            continue
        if not spine or any(call.first <= node.index <= call.last for call in calls for node in spine):
            return calls
    return []


def _handed(tape: Tape, call: Call) -> list[tuple[tuple[int, ...], list[int]]]:
    """Shapes that enter and leave a call, with the axes without which modules inside of it read them."""
    given = {tape.nodes[n].shape for n in call.args.values()}
    handed = {tape.nodes[n].shape for n in call.outputs.values()} & given
    read = {tape.nodes[n].shape for c in tape.calls if c.parent == call.index for n in c.args.values()}
    found = []
    for shape in sorted(s for s in handed if len(s) == NDIM):
        axes = [a for a in range(3) if shape[a] > 1 and (*shape[:a], *shape[a + 1 :]) in read]
        if axes:
            found.append((shape, axes))
    return found


def _fits(tape: Tape, shape: tuple[int, ...], axes: Sequence[int], batch: int) -> list[tuple[int, int]]:
    """What the axes of samples and of streams may be; the third counts the tokens of the text that the model was given."""
    texts = [tape.nodes[n].shape for n in tape.calls[0].args.values()]
    lengths = {s[1] for s in texts if len(s) in {2, 3} and s[0] == batch}
    return [
        (samples, stream)
        for samples in range(3)
        for stream in axes
        if samples != stream and shape[samples] == batch and shape[3 - samples - stream] in lengths
    ]


def _unclear(shape: tuple[int, ...], where: str) -> UnclearAxesError:
    what = f"its blocks hand on tensors {shape} of several streams, and which axis counts samples, tokens or streams cannot be told"
    todo = "Give texts, with another number of samples and of tokens"
    return UnclearAxesError(what, where=where, todo=todo)


def _places(tape: Tape, call: Call, shape: tuple[int, ...]) -> tuple[Place, Place]:
    """Where the streams are in what a block gets and in what it returns: the first of this shape."""
    entry = next(place for place, n in call.args.items() if tape.nodes[n].shape == shape)
    return entry, next(place for place, n in call.outputs.items() if tape.nodes[n].shape == shape)


def _around(tape: Tape, call: Call) -> set[int]:
    """The calls that enclose a call."""
    found = set()
    while call.parent >= 0:
        call = tape.calls[call.parent]
        found.add(call.index)
    return found
