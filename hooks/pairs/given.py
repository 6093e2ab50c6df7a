"""Blocks and branches of one model on the inputs that those of another got: what differs is their own doing.

record = Record(a, operands=True)
with record:
    Passes(a, inputs, base=record.edits).plain(record.on_stream)      # model A, as it is
with Given(b, record, on_output) as given:
    run_stopped(lambda: b.model(**inputs))                           # each block of B on what that of A got
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from rc_probe.hooks.edits.block_watch import BlockWatch, fetch, replace
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.edits.stream_taps import StreamDone, batch_first, laid_out
from rc_probe.hooks.structure.structure import Block, CandidateBlock, Junction, Site, Structure, decodes
from rc_probe.hooks.structure.tape import Place, walk
from rc_probe.hooks.undo import unseen


class Record(BlockWatch):
    """What the blocks of a model get on one batch, kept as copies. To be opened around one pass with its `edits`.

    streams: (batch, tokens, dim) of the layers, by `on_stream`; operands: by site, as the adds of the junctions got them
    """

    def __init__(self, structure: Structure, *, operands: bool) -> None:
        super().__init__(structure, range(structure.depth))
        self.streams: list[Tensor] = []
        self.operands: dict[Site, Tensor] = {}
        self.edits = Edits()  # of its pass: they change nothing
        self._entered: dict[int, Tensor] = {}  # where it is not what left the block before
        self._beside: dict[int, list[Tensor]] = {}
        self._left: Tensor | None = None
        self._decodes = decodes(structure)
        for site in (site for block in structure.blocks for site in _sites(block)) if operands else ():
            self.edits.at(site, partial(self._keep, site))

    def on_stream(self, layer: int, x: Tensor) -> None:
        self.streams.append(x.clone())

    def entered(self, number: int) -> Tensor:
        """What entered a block (from 0), (batch, tokens, dim)."""
        return self._entered.get(number, self.streams[number])

    def beside(self, number: int) -> list[Tensor]:
        """The encoder's states, which a decoder's block gets beside its stream."""
        return self._beside.get(number, [])

    def _keep(self, site: Site, x: Tensor) -> Tensor:
        self.operands[site] = x.detach().clone()
        return x

    def begin(self) -> None:
        self._left = None

    def enter(self, block: CandidateBlock, args: Any, kwargs: Any) -> None:
        stream = fetch((args, kwargs), block.entry)
        if block.index and stream is not self._left:
            self._entered[block.index] = batch_first(stream.detach(), block).clone()
        if self._decodes:
            self._beside[block.index] = [x for _, x in _others(block, args, kwargs)]

    def returned(self, block: CandidateBlock, output: Any) -> None:
        self._left = fetch(output, block.exit)


class Given(BlockWatch):
    """Each block of this model gets the stream that the same block of the recorded one got, and its encoder's states.

    All else that enters (masks, positions, rotary tables) is the model's own. `on_output(number, x)` gets what leaves
    a block, (batch, tokens, dim); the pass ends behind the last one, by StreamDone. Raises RcProbeError where streams
    have other shapes.
    """

    def __init__(
        self, structure: Structure, record: Record, on_output: Callable[[int, Tensor], None]
    ) -> None:
        super().__init__(structure, range(structure.depth))
        self.record, self.on_output, self._decodes = record, on_output, decodes(structure)

    def enter(self, block: CandidateBlock, args: Any, kwargs: Any) -> Any:
        own = fetch((args, kwargs), block.entry)
        x = self.record.entered(block.index)
        self._same_shape(block, tuple(batch_first(own, block).shape), tuple(x.shape))
        given = replace((args, kwargs), block.entry, laid_out(x.to(own, copy=True), block, own))
        others = _others(block, args, kwargs) if self._decodes else []
        theirs = self.record.beside(block.index)
        if len(others) != len(theirs):
            what = "it is given more or less beside its stream than in the other model"
            raise self.structure.error(block, what, "Leave its sensitivity out")
        for (place, mine), its in zip(others, theirs, strict=True):
            self._same_shape(block, tuple(mine.shape), tuple(its.shape))
            given = replace(given, place, its.to(mine, copy=True))
        return given

    def returned(self, block: CandidateBlock, output: Any) -> None:
        with unseen():
            self.on_output(block.index, batch_first(fetch(output, block.exit).detach(), block))
        if block.index + 1 == self.structure.depth:
            raise StreamDone

    def _same_shape(self, block: CandidateBlock, mine: tuple[int, ...], theirs: tuple[int, ...]) -> None:
        if mine != theirs:
            what = f"its input has the shape {mine}, in the other model {theirs}"
            raise self.structure.error(block, what, "Leave its sensitivity out")


class Swapped:
    """The edits that read what each branch adds, and put the recorded operands in its place.

    So each branch gets what the same branch of the recorded model got, whatever the branches before it added. got: by
    site of this model
    """

    def __init__(self, structure: Structure, record: Record) -> None:
        self.got: dict[Site, Tensor] = {}
        self.edits, self._record = Edits(), record
        of: Structure = record.structure  # type: ignore[assignment]
        for mine, theirs in zip(structure.blocks, of.blocks, strict=True):
            for site, its in zip(_sites(mine), _sites(theirs), strict=True):
                self.edits.at(site, partial(self._swap, site, its))

    def _swap(self, site: Site, its: Site, x: Tensor) -> Tensor:
        self.got[site] = x.detach().clone()
        return self._record.operands[its].to(x)


def added(block: Block, junction: Junction, values: dict[Site, Tensor], like: Tensor) -> dict[str, Tensor]:
    """What the branches of a junction add, by their kind, (batch, tokens, dim) float64; and under "" the skip's.

    values: operands by site; like: a stream (batch, tokens, dim)
    """
    found = {"": _stream(values[junction.skip], block, like)}
    for branch in junction.branches:
        value = _stream(values[branch.site], block, like)
        found[branch.kind] = found[branch.kind] + value if branch.kind in found else value
    return found


def _stream(value: Tensor, block: Block, like: Tensor) -> Tensor:
    """An operand of a junction's add as (batch, tokens, dim), float64; `like` is a stream in that form."""
    outside = block.outside(value, value.shape)
    return (
        batch_first(outside, block) if outside.ndim == block.ndim else outside.reshape(like.shape)
    ).double()


def built_alike(a: Structure, b: Structure) -> bool:
    """Whether the blocks of both have the same junctions with the same kinds of branches."""
    kinds = [[[[r.kind for r in j.branches] for j in block.junctions] for block in s.blocks] for s in (a, b)]
    return kinds[0] == kinds[1]


def _sites(block: Block) -> list[Site]:
    return [site for junction in block.junctions for site in junction.sites]


def _others(block: CandidateBlock, args: Any, kwargs: Any) -> list[tuple[Place, Tensor]]:
    """The further streams that enter a decoder's block, with their places: the encoder's states."""
    found = walk((args, kwargs))
    return [(at, x) for at, x in found if at != block.entry and x.ndim == 3 and x.is_floating_point()]
