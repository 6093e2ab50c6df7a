"""Freeze: one pass of the real model in which the stream is kept as a sum of parts.

Attention patterns, norm scales and activation gates are those of the clean run, so that the network is
linear in its input and equal to the real one (rank-collapse notes of Dong et al. 2021, theorem 2.1, with
norms and MLPs as linear maps). What a path is, and which parts go which way, is said by edits on the
operands of junctions: parts.py has the arithmetic.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rc_probe.hooks.edits.block_watch import BlockWatch, fetch, replace
from rc_probe.hooks.edits.edits import Editing, Edits
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.edits.single_precision import HALVES, single_precision
from rc_probe.hooks.edits.stream_taps import StreamDone
from rc_probe.hooks.errors import RcProbeError, reason
from rc_probe.hooks.operator_rules import become
from rc_probe.hooks.structure.example_inputs import with_no_cache
from rc_probe.hooks.structure.structure import AttentionOp, Branch, Candidate, CandidateBlock, Site, Structure
from rc_probe.hooks.structure.tape import walk
from rc_probe.hooks.undo import hook

from .head_choice import kept_heads
from .parts import NO_PARTS, Ledger, Parts, Unknown, plain

HOPS = {"attention", "mixer"}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 2e-6}  # a float64 model may cast its norms to float32


@dataclass(frozen=True)
class Hop:
    """A branch that a path may take. heads: in how many ways; ops: where these are told apart, if they can be."""

    site: Site
    kind: str
    heads: int
    ops: tuple[AttentionOp, ...]


@dataclass(frozen=True)
class Step:
    """One choice of every path: go by (skip, and branches that are no hops), or take one head of one hop."""

    block: int
    junction: int
    others: tuple[Site, ...]
    hops: tuple[Hop, ...]

    @property
    def heads(self) -> int:
        """Among how many a path chooses that does not go by."""
        return sum(hop.heads for hop in self.hops)


def steps(structure: Structure, *, count_mlp: bool = False) -> list[Step]:
    """The choices of a path, in order: every junction with attention (or another mixer), one a block as a rule.

    With `count_mlp`, MLPs are hops, too. Cross-attention is none: it brings in what does not come from the stream.
    A branch whose heads cannot be told apart, or with skips of its own, counts as one. Branches that are computed
    side by side are one choice, also where they are added one after the other (Cohere).
    """
    kinds = HOPS | ({"mlp"} if count_mlp else set())
    found = []
    for block in structure.blocks:
        taken: set[Site] = set()
        for number, junction in enumerate(block.junctions):
            later = (b for j in block.junctions[number + 1 :] for b in j.branches if b.reads < number)
            branches = [b for b in (*junction.branches, *later) if b.site not in taken]
            hops = tuple(Hop(b.site, b.kind, *_heads(b)) for b in branches if b.kind in kinds)
            others = (junction.skip, *(b.site for b in branches if b.kind not in kinds))
            if hops:
                found.append(Step(block.index, number, others, hops))
                taken |= {hop.site for hop in hops}
    return found


def _heads(branch: Branch) -> tuple[int, tuple[AttentionOp, ...]]:
    apart = branch.kind == "attention" and branch.heads and not branch.inner
    return (branch.heads, branch.ops) if apart else (1, ())


def head_of(step: Step, hop: Hop, heads: Tensor) -> Tensor:
    """Which head of the hop is taken, (rows, heads) bool. heads (rows,): numbered from 0 over the step's hops, -1 for none."""
    first = sum(h.heads for h in step.hops[: step.hops.index(hop)])
    return heads[:, None] == torch.arange(hop.heads, device=heads.device) + first


@dataclass(frozen=True)
class Frozen:
    """What one frozen pass gives. stream: after the last block; hidden: the last hidden state, after the final norm.

    named: the model returns it as `last_hidden_state`, (batch, tokens, dim) whatever the layout in the blocks
    """

    stream: Parts
    hidden: Parts
    named: bool


class _Pass(BlockWatch):
    """Puts the parts in before block 1, and takes them out behind the last block and the stack."""

    def __init__(
        self, structure: Structure, start: Callable[[Tensor], Parts], outputs: dict[int, Any] | None
    ) -> None:
        super().__init__(structure, range(structure.depth))
        self.start, self.outputs = start, outputs
        self.stream: Any = None
        self.hidden: Any = None
        self.named = False
        self.given: set[int] = {
            id(buffer) for buffer in structure.model.buffers()
        }  # tensors that are not ours

    @contextmanager
    def opened(self) -> Iterator[None]:
        names = _holders(self.structure)
        with ExitStack() as stack:
            for name in names:
                hold = self._hold(last=name == names[-1])
                stack.enter_context(hook(self.model.get_submodule(name).register_forward_hook, hold))
            yield

    def enter(self, block: CandidateBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if block.index:
            return None
        stream = fetch((args, kwargs), block.entry)
        parts = self.start(stream)
        if type(stream) is Tensor and id(stream) not in self.given:
            parts = become(stream, parts)  # also for code around the blocks that goes on with it
        return replace((args, kwargs), block.entry, parts)

    def leave(self, block: CandidateBlock, output: Any) -> None:
        stream = fetch(output, block.exit)
        if isinstance(stream, Unknown):
            raise self.structure.error(block, f"`{stream.op}` has no rule in path arithmetic", NO_PARTS)
        if not isinstance(stream, Parts):
            raise self.structure.error(block, "its output does not follow its input", NO_PARTS)
        _ = stream.parts  # now, so that nothing of the block has to be kept
        if block.index == self.structure.depth - 1:
            self.stream = self.hidden = stream

    def returned(self, block: CandidateBlock, output: Any) -> None:
        if self.outputs is not None:
            self.outputs[block.index] = plain(output)

    def _hold(self, *, last: bool) -> Callable[..., None]:
        mine = weakref.ref(self)  # what is dropped, interrupted, must not be kept by the model

        def hold(module: Any, args: Any, output: Any) -> None:
            if (me := mine()) is None:
                return
            named = getattr(output, "last_hidden_state", None)
            found = _only(output, me.stream) if named is None else named
            like = me.stream
            if isinstance(found, Parts) and like is not None and _alike(found, like, named is not None):
                _ = found.parts
                me.hidden, me.named = found, named is not None
            if last and like is not None:
                raise StreamDone

        return hold


def _holders(structure: Candidate) -> list[str]:
    """The modules around the stack whose output is its last hidden state, from the inside out.

    Not what stands around the library's base model (heads), nor what holds other stacks.
    """
    names = sorted(structure.ancestors, key=len, reverse=True)
    base = getattr(structure.model, "base_model_prefix", "")
    inside = [n for n in names if n == base or n.startswith(f"{base}.")] if base in names else names
    alone = [n for n in inside if not any(o.startswith(f"{n}.") or not n for o in structure.others)]
    return alone or names[:1]


def _only(output: Any, like: Any) -> Any:
    """The one tensor that can be it; None where states of several layers are returned."""
    found = [
        t for _, t in walk(output) if isinstance(t, Parts) and like is not None and _alike(t, like, False)
    ]
    return found[0] if len({id(t._kept) for t in found}) == 1 else None


def _alike(a: Tensor, b: Tensor, named: bool) -> bool:
    """Whether `a` can be the hidden state of the tokens of `b`; one that is named so may have another width."""
    return sorted(a.shape) == sorted(b.shape) or (named and sorted(a.shape[:-1]) == sorted(b.shape[:-1]))


def frozen(
    structure: Structure,
    inputs: dict[str, Any],
    ledger: Ledger,
    start: Callable[[Tensor], Tensor],
    edits: Edits,
    around: AbstractContextManager[Any] | None = None,
    outputs: dict[int, Any] | None = None,
) -> Frozen:
    """Run the model on `inputs` with its stream in parts.

    start: makes the parts (channels, …) of the stream that enters block 1, which may be in parts already
    around: a context for the pass
    outputs: gets what each block returned, by its number, as plain tensors
    edits: what happens to operands of junctions and attention ops, as functions of Parts

    A model in half precision is run in float32, one operation's weights at a time.

    Raises RcProbeError, naming the operation, where the parts cannot be followed.
    """
    _check_dtype(structure)
    run = _Pass(
        structure, lambda x: Parts(x.value if isinstance(x, Parts) else x.detach(), start(x), ledger), outputs
    )
    run.given |= {id(a) for a in tree_leaves(inputs)}
    with measuring(structure.model), single_precision(structure.model), ExitStack() as stack:
        stack.enter_context(run)
        stack.enter_context(Editing(structure, edits))
        stack.enter_context(around or nullcontext())
        try:
            structure.model(**with_no_cache(structure.model, inputs))
        except StreamDone:
            pass
        except RcProbeError:
            raise
        except Exception as error:  # code that does not take parts, of any kind
            raise RcProbeError(
                f"the model does not run in path arithmetic ({reason(error)})",
                where=type(structure.model).__name__,
                todo=NO_PARTS,
            ) from error
    if run.stream is None:
        raise RcProbeError("its blocks did not run", where=type(structure.model).__name__, todo=NO_PARTS)
    return Frozen(run.stream, run.hidden, run.named)


def _check_dtype(structure: Structure) -> None:
    dtype = next((p.dtype for p in structure.model.parameters() if p.is_floating_point()), torch.float32)
    if dtype not in {*TOLERANCE, *HALVES}:
        raise RcProbeError(
            f"paths have no arithmetic for weights in {str(dtype).removeprefix('torch.')}",
            where=type(structure.model).__name__,
            todo="Load it with --dtype float32",
        )


OnHop = Callable[[int, Hop, Parts], Parts]
Chosen = Callable[[int, Hop], Tensor]
OnOthers = Callable[[int, Parts], Parts]


def hop_edits(
    structure: Structure,
    choices: list[Step],
    on_hop: OnHop,
    *,
    on_others: OnOthers | None = None,
    chosen: Chosen | None = None,
) -> Edits:
    """Edits of parts at every step: on_hop(step number, hop, what the branch adds) and so on.

    on_others: what goes by (skip, branches that are no hops)
    chosen: the heads of a hop that each draw keeps, (draws, heads) bool, applied where an attention op shows them
    """
    edits = Edits()
    for number, step in enumerate(choices):
        for hop in step.hops:
            edits.at(hop.site, _on_parts(structure, step, hop, partial(on_hop, number, hop)))
            for op in hop.ops if chosen else ():
                assert chosen is not None
                edits.at_op(step.block, op, kept_heads(op, chosen(number, hop)))
        for site in step.others if on_others else ():
            assert on_others is not None
            edits.at(site, _if_parts(partial(on_others, number)))
    taken = {hop.site for step in choices for hop in step.hops}
    for site in (b.site for block in structure.blocks for b in block.branches):
        if site not in taken:
            edits.at(
                site, _if_parts(lambda x: x.made(lambda parts: parts))
            )  # it is settled what it is made of
    return edits


def _if_parts(function: Callable[[Parts], Parts]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x) if isinstance(x, Parts) else x


def _on_parts(
    structure: Structure, step: Step, hop: Hop, function: Callable[[Parts], Parts]
) -> Callable[[Tensor], Tensor]:
    def edit(x: Tensor) -> Tensor:
        block = structure.blocks[step.block]
        if isinstance(x, Unknown):
            raise structure.error(block, f"`{x.op}` has no rule in path arithmetic", NO_PARTS)
        if not isinstance(x, Parts):
            return x  # nothing of the stream is in it
        if x.bilinear and hop.kind in HOPS:
            raise structure.error(
                block,
                f"its {hop.kind} branch multiplies values of the stream with each other, and none is a pattern",
                NO_PARTS,
            )
        return function(x)

    return edit
