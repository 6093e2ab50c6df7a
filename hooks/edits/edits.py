"""Edits: functions applied to one operand of one add, around an attention op, or past a norm.

An edit never touches weights. While a block with edits runs, a TorchFunctionMode counts the adds of
stream shape and hands the chosen operand through its function before the real add is run; the real
add keeps dtype and layout as the model made them. Outside these blocks nothing is intercepted.

Attention ops are edited the same way, by the library's interface where the model routes through it
and else where the mode meets them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rc_probe.hooks.module_calls import Call, around_calls
from rc_probe.hooks.structure.structure import INTERFACE, AttentionOp, Candidate, CandidateBlock, Site
from rc_probe.hooks.undo import undoing

from .attention.pass_inputs import PassInputs
from .attention_interface import OpCall, RunOp, owned
from .block_mode import (
    BlockMode,
    Function,
    ModuleEdit,
    ModuleKey,
    ModuleWatch,
    OpEdit,
    OpKey,
    OpWatch,
    Plan,
)
from .block_watch import BlockWatch, fetch, replace
from .model_state import measuring, recomputing
from .recording import filled, own

FIRST = -1


@dataclass(frozen=True)
class Around:
    """What is done around an attention op: an OpEdit itself. The inner edit gets the call as the outer has made it."""

    outer: OpEdit | None = None
    inner: OpEdit | None = None

    def __call__(self, call: OpCall, run: RunOp) -> Any:
        inner = self.inner
        within = run if inner is None else lambda c: inner(c, run)
        return within(call) if self.outer is None else self.outer(call, within)

    def then(self, later: Around) -> Around:
        return Around(_around(self.outer, later.outer), _around(self.inner, later.inner))


def _around(first: OpEdit | None, second: OpEdit | None) -> OpEdit | None:
    if first is None or second is None:
        return first or second
    return lambda call, run: second(call, lambda c: first(c, run))


@dataclass
class Edits:
    """What to do where. Several edits at one place are applied in the order in which they came."""

    operands: dict[Site, Function] = field(default_factory=dict)
    ops: dict[tuple[int, OpKey], Around] = field(default_factory=dict)
    watches: dict[tuple[int, OpKey], OpWatch] = field(default_factory=dict)
    # (block, junction) whose norms are left out; FIRST: those that the stream goes through before the first one
    bypass: set[tuple[int, int]] = field(default_factory=set)
    norms: dict[ModuleKey, ModuleEdit] = field(default_factory=dict)  # what stands in place of norms
    norm_watches: dict[ModuleKey, list[ModuleWatch]] = field(default_factory=dict)
    identity: set[int] = field(default_factory=set)  # blocks whose stream leaves as it entered
    outputs: dict[ModuleKey, ModuleEdit] = field(default_factory=dict)  # of modules inside blocks, no norms
    inputs: list[PassInputs] = field(default_factory=list)  # what edits want to know of the pass that runs
    readings: Edits | None = None  # what has to be read in the plain pass on the same inputs first: watches

    def at(self, site: Site, function: Function) -> None:
        first = self.operands.get(site)
        if first is None or (first is zero and function is zero):
            self.operands[site] = function
        else:
            self.operands[site] = _then(first, function)

    @property
    def removed(self) -> set[Site]:
        """The operands that are set to zero, whatever they are."""
        return {site for site, function in self.operands.items() if function is zero}

    def then(self, other: Edits) -> Edits:
        """These edits, and after them the others."""
        both = Edits(
            dict(self.operands), dict(self.ops), dict(self.watches), self.bypass | other.bypass,
            self.norms | other.norms, {key: list(watches) for key, watches in self.norm_watches.items()},
            self.identity | other.identity, dict(self.outputs), [*self.inputs, *other.inputs],
            self.readings.then(other.readings or Edits()) if self.readings else other.readings,
        )  # fmt: skip
        for site, function in other.operands.items():
            both.at(site, function)
        for key, edit in other.ops.items():
            both.ops[key] = both.ops.get(key, Around()).then(edit)
        for key, watch in other.watches.items():
            both._watch(key, watch)
        for norm, watches in other.norm_watches.items():
            for one in watches:
                both.watch_norm(norm, one)
        for place, output in other.outputs.items():
            both.at_module(*place, output)
        return both

    def around_op(self, block: int, op: AttentionOp, edit: OpEdit, *, inner: bool = False) -> None:
        """Edit what enters or leaves an attention op: `edit` gets the call and the function that runs it.

        New masks and temperatures go here, as `lambda call, run: run(replace(call, args=…))`. inner: it gets the call
        as all others have made it, in whatever order they came.
        """
        key = _key(block, op)
        self.ops[key] = self.ops.get(key, Around()).then(Around(inner=edit) if inner else Around(edit))

    def at_op(self, block: int, op: AttentionOp, function: Function) -> None:
        """Hand the op's output through `function`: see AttentionOp for its layout."""

        def edit(call: OpCall, run: RunOp) -> Any:
            result = run(call)
            return (function(result[0]), *result[1:]) if isinstance(result, tuple) else function(result)

        self.around_op(block, op, edit)

    def at_module(self, block: int, name: str, turn: int, edit: ModuleEdit) -> None:
        """Hand what a module inside a block returns, one tensor, through `edit`, which gets what it reads, too."""
        first = self.outputs.get((block, name, turn))
        self.outputs[block, name, turn] = edit if first is None else lambda x, y: edit(x, first(x, y))

    def watch_op(self, block: int, op: AttentionOp, watch: OpWatch) -> None:
        """See an attention op as it runs, whatever other contexts do to its operands."""
        self._watch(_key(block, op), watch)

    def watch_norm(self, key: ModuleKey, watch: ModuleWatch) -> None:
        """See what a norm reads and what it gives."""
        self.norm_watches.setdefault(key, []).append(watch)

    def _watch(self, key: tuple[int, OpKey], watch: OpWatch) -> None:
        first = self.watches.get(key)

        def both(call: OpCall, result: Any) -> None:
            if first is not None:
                first(call, result)
            watch(call, result)

        self.watches[key] = both

    @property
    def inside(self) -> set[int]:
        """The blocks with edits or watches of what runs inside their branches."""
        return {block for block, _ in (*self.ops, *self.watches)} | {block for block, _, _ in self.outputs}

    @property
    def blocks(self) -> set[int]:
        norms = {key[0] for key in (*self.norms, *self.norm_watches)} | {b for b, _ in self.bypass}
        return {s.block for s in self.operands} | self.inside | norms | self.identity

    @property
    def routed(self) -> bool:
        """Whether the attention interface has to be owned."""
        return any(routed for _, (routed, _) in (*self.ops, *self.watches))


def _key(block: int, op: AttentionOp) -> tuple[int, OpKey]:
    return block, (op.via == INTERFACE, op.ordinal)


def zero(x: Tensor) -> Tensor:
    """The edit that removes an operand exactly."""
    return torch.zeros_like(x)


def _past(x: Tensor, y: Tensor) -> Tensor:
    return x.clone()


def _then(first: Function, second: Function) -> Function:
    return lambda x: second(first(x))


def _plans(structure: Candidate, edits: Edits, owning: bool) -> dict[int, Plan]:
    plans = {index: Plan() for index in edits.blocks}
    for site, function in edits.operands.items():
        plans[site.block].operands.setdefault(site.ordinal, []).append((site.operand, function))
    for (index, key), edit in edits.ops.items():
        plans[index].ops[key] = edit
    for (index, key), watch in edits.watches.items():
        plans[index].watches[key] = watch
    for (index, name, turn), norm in edits.norms.items():
        plans[index].norms[structure.model.get_submodule(name), turn] = norm
    for (index, name, turn), watches in edits.norm_watches.items():
        plans[index].norm_watches[structure.model.get_submodule(name), turn] = watches
    for index, junction in edits.bypass:
        block = structure.blocks[index]
        norms = block.norms if junction == FIRST else block.junctions[junction].norms
        plans[index].norms |= {(structure.model.get_submodule(n.name), n.turn): _past for n in norms}
    for (index, name, turn), output in edits.outputs.items():
        plans[index].outputs[structure.model.get_submodule(name), turn] = output
    for index, plan in plans.items():
        whole = tuple(structure.module(structure.blocks[index]).modules())
        plan.inside, plan.modules = whole[1:], set(whole) if owning else set()
    return plans


class Editing(BlockWatch):
    """Context in which the model runs with `edits`. The model is as before when it closes.

    `own` takes the attention interface over even where no edit needs it. What edits have to read of the plain pass is
    read by a pass before each call of the model, unless it has been `read` already.
    """

    def __init__(
        self, structure: Candidate, edits: Edits, *, own: bool = False, skipped: int = 0, read: bool = False
    ) -> None:
        super().__init__(structure, edits.blocks, skipped=skipped)
        self._identity, self._entered = edits.identity, dict[int, Tensor]()
        self._inputs, self._readings = edits.inputs, None if read else edits.readings
        self._inside = self._reading = False  # of the outermost call, and of the pass before it
        self.own = own or edits.routed
        self._plans = _plans(structure, edits, self.own)
        self._modes: list[BlockMode] = []

    @contextmanager
    def opened(self) -> Iterator[None]:
        plans = self._plans.values()
        modules = [m for plan in plans for m, _ in (*plan.norms, *plan.norm_watches, *plan.outputs)]
        holders = [self.model.get_submodule(name) for name in self.structure.ancestors]
        with ExitStack() as stack:
            if self._readings is not None:
                stack.enter_context(around_calls(holders, self._read_first, heard=self.heard))
            stack.enter_context(around_calls(modules, self._called))
            for inputs in self._inputs:
                stack.enter_context(around_calls(holders, inputs.called))
            if self.own:
                stack.enter_context(owned(self.model))
            yield

    def heard(self) -> bool:
        return not self._reading and super().heard()

    def _read_first(self, module: nn.Module, call: Call, args: Any, kwargs: Any) -> Any:
        """A plain pass, in which edits read what they need, before the outermost call of a module that holds all blocks."""
        if self._inside:
            return call()

        def end() -> None:
            self._inside = False

        with undoing(end):
            self._inside = True
            self._read(module, [own(value) for value in args], {key: own(kwargs[key]) for key in kwargs})
            return call()

    def _read(self, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if any(filled(value) for value in (*args, *kwargs.values())):
            what = "what a filled cache holds is that of the edited model, and its plain pass is not known"
            raise self.structure.error(self.structure.blocks[0], what, "Run it with use_cache=False")

        def end() -> None:
            self._reading = False

        assert self._readings is not None
        with undoing(end), measuring(self.model), Editing(self.structure, self._readings):
            self._reading = True
            module(*args, **kwargs)

    def enter(self, block: CandidateBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recomputing() and sum(b.name == block.name for b in self.structure.blocks) > 1:
            raise self.structure.error(
                block,
                "gradient checkpointing recomputes a module that is called several times, and the gates of which "
                "call cannot be told",
                "Run it without gradient checkpointing",
            )
        for inputs in self._inputs:
            inputs.entered(block, fetch((args, kwargs), block.entry))
        if block.index in self._identity:
            self._entered[block.index] = fetch(
                (args, kwargs), block.entry
            ).clone()  # the block may write into it
        mode = BlockMode(block, self._plans[block.index])
        self._modes.append(mode)
        mode.__enter__()

    def skip_adds(self, count: int) -> None:
        """A module that would have made so many adds of stream shape was not called in the block that runs."""
        self._modes[-1].adds += count

    def ended(self, block: CandidateBlock) -> None:
        """A call that raised has left its mode on; other calls of blocks may be running around this one."""
        while self._modes and self._modes[-1].block is block:
            self._modes[-1].close()
            self._modes.pop()

    def leave(self, block: CandidateBlock, output: Any) -> Any:
        mode = self._modes[-1]
        self.ended(block)
        # How many attention operations there are may depend on the inputs, one for each image of a batch.
        fits = mode.adds == block.adds
        if mode.plan.ops or mode.plan.watches:
            fits = fits and mode.ops == block.attention_ops
        if mode.plan.routed:
            fits = fits and len(mode.routed) == block.routed
        if not fits:
            raise self.structure.error(
                block,
                f"this call made {mode.adds} adds of stream shape, {mode.ops} attention operations and "
                f"{len(mode.routed)} calls of the attention interface; {block.adds}, {block.attention_ops} and "
                f"{block.routed} were seen when the model was attached",
                "Attach again with inputs like the ones that you run",
            )
        if mode.edited != len(mode.plan.outputs):
            what = f"{mode.edited} of {len(mode.plan.outputs)} modules that are edited inside it ran"
            raise self.structure.error(block, what, "Attach again with inputs like the ones that you run")
        if block.index not in self._identity:
            return None
        stream = self._entered.pop(block.index)
        if stream.shape != fetch(output, block.exit).shape:
            raise self.structure.error(
                block, "its stream leaves in another shape than it enters", "It cannot be left out"
            )
        return replace(output, block.exit, stream)

    def _called(self, module: nn.Module, call: Call, args: Any, kwargs: Any) -> Any:
        """A module inside a block, whose norm is passed by or whose output is edited."""
        output = call()
        if not self._modes:
            return output
        mode = self._modes[-1]
        turn = mode.turns.get(module, 0)
        mode.turns[module] = turn + 1
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        output = mode.through_norm((module, turn), x, output)
        edit = mode.plan.outputs.get((module, turn))
        if edit is not None:
            output = mode.checked(edit)(x, output)
            mode.edited += 1
        return output
