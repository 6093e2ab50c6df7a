"""Passes of a model on one batch: a plain one, recorded, and edited ones that begin where their edits begin.

In an edited pass the model's own forward runs again, and with it all that lies between blocks. Blocks before the
first edit, modules of the first edited block that are done before its edit, and modules that are done before the stack
begins (an encoder, embeddings), return copies of what they returned in the plain pass. Modules whose results are only
removed again are not called; the adds that these would make are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from rc_probe.hooks.module_calls import Around, Call, around_calls, hooked
from rc_probe.hooks.structure.example_inputs import with_no_cache
from rc_probe.hooks.structure.flow import InnerCall
from rc_probe.hooks.structure.structure import Structure

from .edits import FIRST, Editing, Edits
from .recording import NotRecordable, copied, form_of, own, size_of, zeros_like
from .stream_taps import StreamDone, Tap

OnStream = Callable[[int, Tensor], None]
LIMIT = 2**31  # bytes of recorded outputs
Inner = tuple[int, nn.Module]  # a module, called once in the block of this number


class Passes:
    """The plain pass on `inputs`, and edited ones. Use inside `measuring(model)`.

    >>> passes = Passes(structure, inputs, [edits])               # doctest: +SKIP
    >>> whole = passes.plain(on_stream)                            # doctest: +SKIP
    >>> without = passes.edited(edits, on_stream)                  # doctest: +SKIP

    wanted: the edits that will be asked for; base: edits of every pass, the plain one too
    model: whose forward runs, if not the structure's own: one that holds or is held by it
    shortcuts: False makes each pass a full one; limit: bytes of outputs that are kept
    proving: everything is recorded, for edits that are not in `wanted`
    """

    def __init__(
        self,
        structure: Structure,
        inputs: dict[str, Any],
        wanted: Iterable[Edits] = (),
        *,
        base: Edits | None = None,
        model: nn.Module | None = None,
        shortcuts: bool = True,
        proving: bool = False,
        limit: int = LIMIT,
    ) -> None:
        self.structure, self.model = structure, model or structure.model
        self.inputs = with_no_cache(self.model, inputs)
        self.base, self.shortcuts, self.limit = base or Edits(), shortcuts, limit
        self.recorded: list[Any] = []  # outputs of the first blocks, as far as the limit allows
        self.finished: dict[nn.Module, Any] = {}  # outputs of modules that are done before block 1
        self.begun: dict[
            Inner, Any
        ] = {}  # outputs of modules that are done before the first edit of their block
        self.forms: dict[Inner, Any] = {}
        self._room = limit
        self._numbers = {(structure.module(b), b.turn): b.index for b in structure.blocks}
        self._turns: dict[nn.Module, int] = {}
        self._inside = -1  # the block call that runs
        self._wanted: set[Inner] = set()
        self._begins: set[Inner] = set()
        self._reach = structure.depth if proving else 0  # how many blocks are recorded
        self._readings = Edits()  # of all that is wanted, in the plain pass
        for edits in wanted:
            self._readings = self._readings.then(edits.readings or Edits())
            if not shortcuts:
                continue
            self._wanted |= set(self._unused(self.base.then(edits)))
            self._begins |= set(self._done_before(edits))
            self._reach = max(self._reach, min(edits.blocks, default=0))

    def first(self, edits: Edits) -> int:
        """The number of blocks, from the first, that an edited pass does not run."""
        return min(len(self.recorded), *edits.blocks) if self.shortcuts else 0

    # ---- the two kinds of passes

    def plain(self, on_stream: OnStream | None = None, *, stop: bool = False) -> Any:
        """The model's output; None with `stop`, which ends the pass behind the last block.

        on_stream: gets layer and stream (batch, tokens, dim), layers 0 … L
        """
        around = self._record if self.shortcuts else None
        if self.base.readings is not None:
            self._run(self.base.readings, None, False, None, 0)
        return self._run(self.base.then(self._readings), on_stream, stop, around, 0)

    def edited(self, edits: Edits, on_stream: OnStream | None = None, *, stop: bool = False) -> Any:
        """The output under `edits`; `on_stream` gets layers behind the first edited block: the others are as before."""
        skipped = self.first(edits)
        together = self.base.then(edits)
        unused = _known(self._unused(together), self.forms) if self.shortcuts else {}
        begun = _known(self._done_before(edits), self.begun) if self.shortcuts else {}
        first = min(edits.blocks, default=self.structure.depth)

        def beyond(layer: int, x: Tensor) -> None:
            if on_stream is not None and layer > first:
                on_stream(layer, x)

        if not (skipped or unused or begun or self.finished):
            return self._run(together, beyond, stop, None, 0)
        with Editing(self.structure, together, skipped=skipped, read=True) as editing:

            def serve(module: nn.Module, call: Call, args: Any, kwargs: Any) -> Any:
                if module in self.finished:
                    return copied(self.finished[module])
                number = self._number(module)
                if number is not None:
                    return copied(self.recorded[number]) if number < skipped else self._within(number, call)
                key = (self._inside, module)
                if key in unused:
                    editing.skip_adds(unused[key])
                    return zeros_like(self.forms[key])
                if key in begun:
                    editing.skip_adds(begun[key])
                    return copied(self.begun[key])
                return call()

            return self._run(
                None, beyond, stop, serve, skipped, [module for _, module in {**unused, **begun}]
            )

    def _run(
        self,
        edits: Edits | None,
        on_stream: OnStream | None,
        stop: bool,
        around: Around | None,
        skipped: int,
        inner: Sequence[nn.Module] = (),
    ) -> Any:
        self._turns.clear()
        self._inside = -1
        self.tap = tap = Tap(self.structure, on_stream or _nothing, stop=stop, skipped=skipped)
        with ExitStack() as stack:
            if edits is not None:
                stack.enter_context(Editing(self.structure, edits, read=True))
            if on_stream is not None or stop:
                stack.enter_context(tap)
            if around is not None:
                blocks = [module for module, _ in self._numbers]
                inner = inner or [module for _, module in self._wanted | self._begins]
                modules = [*blocks, *self._before(), *inner]
                stack.enter_context(around_calls(modules, around, outermost=True))
            try:
                return self.model(**{name: own(value) for name, value in self.inputs.items()})
            except StreamDone:
                return None

    # ---- recording

    def _record(self, module: nn.Module, call: Call, args: Any, kwargs: Any) -> Any:
        number = self._number(module)
        output = call() if number is None else self._within(number, call)
        try:
            if number is not None:
                self._keep_block(number, output)
            elif self._inside < 0:
                self.finished[module] = copied(output)
            else:
                self._keep_inner((self._inside, module), output)
        except NotRecordable:
            pass
        return output

    def _keep_block(self, number: int, output: Any) -> None:
        if number != len(self.recorded) or number >= self._reach:
            return
        self._room -= size_of(output)
        if self._room >= 0:
            self.recorded.append(copied(output))

    def _keep_inner(self, key: Inner, output: Any) -> None:
        if key in self._wanted:
            self.forms[key] = form_of(output)
        size = size_of(output)
        later = (self._reach - len(self.recorded)) * size  # whole blocks come first: each is about as large
        if key in self._begins and size + later <= self._room:
            self._room -= size
            self.begun[key] = copied(output)

    def _number(self, module: nn.Module) -> int | None:
        """Which block call this is; None where the module is no block."""
        turn = self._turns.get(module, 0)
        number = self._numbers.get((module, turn))
        if number is not None:
            self._turns[module] = turn + 1
        return number

    def _within(self, number: int, call: Call) -> Any:
        self._inside = number
        try:
            return call()
        finally:
            self._inside = -1

    def _before(self) -> list[nn.Module]:
        return [self.structure.model.get_submodule(name) for name in self.structure.before]

    # ---- what is not needed

    def _done_before(self, edits: Edits) -> dict[Inner, int]:
        """The modules of the first edited block that are done before its first edit, and the adds that they make."""
        number = min(edits.blocks, default=-1)
        inside = (
            self.base.inside | edits.inside | {key[0] for each in (self.base, edits) for key in each.norms}
        )
        if number < 0 or number in edits.identity | inside:
            return {}
        block = self.structure.blocks[number]
        places = [site.ordinal for site in edits.operands if site.block == number]
        places += [
            0 if junction == FIRST else block.junctions[junction].skip.ordinal
            for index, junction in edits.bypass
            if index == number
        ]
        return self._unheard(number, block.flow.before(min(places)))

    def _unused(self, edits: Edits) -> dict[Inner, int]:
        """The modules that need not be called, each in its block, and the adds that they would make."""
        found: dict[Inner, int] = {}
        for block in (self.structure.blocks[index] for index in edits.blocks - edits.inside):
            sites = {site for site in edits.removed if site.block == block.index}
            whole = block.index in edits.identity
            if not (sites or whole):
                continue
            found |= self._unheard(block.index, block.flow.unused(sites, whole=whole))
        return found

    def _unheard(self, number: int, calls: Iterable[InnerCall]) -> dict[Inner, int]:
        """Of these modules those to which nobody listens, who would miss the call; each in its block, with its adds."""
        modules = {self.structure.model.get_submodule(call.name): call.adds for call in calls}
        return {(number, module): adds for module, adds in modules.items() if not _hooked(module)}


def _known(wanted: dict[Inner, int], recorded: dict[Inner, Any]) -> dict[Inner, int]:
    return {key: adds for key, adds in wanted.items() if key in recorded}


def _nothing(layer: int, x: Tensor) -> None:
    """For passes of which no stream is read."""


def _hooked(module: nn.Module) -> bool:
    """Whether somebody listens to it or to a part of it, who would miss the call."""
    return any(map(hooked, module.modules()))
