"""What attaching found, checked again by other arithmetic: whole forward passes, plain hooks, zeroed modules.

Attaching replays single blocks on their inputs. Here the whole model runs, under gates as a user sets
them, and what enters and leaves the blocks is read by hooks of our own. Each check returns the number
of facts that it compared, and raises `Wrong` where one does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rc_probe.hooks.components import COMPONENTS, ONLY_REMOVED
from rc_probe.hooks.edits.block_watch import fetch, replace
from rc_probe.hooks.edits.edits import Editing, Edits
from rc_probe.hooks.edits.gates import Gate, gate_edits, has_component
from rc_probe.hooks.structure.structure import Block, Branch, Junction, Structure
from rc_probe.hooks.structure.tape import walk

Inputs = dict[str, Any]
Streams = dict[int, tuple[Tensor, Tensor]]  # block -> (what entered it, what left it)
Turn = tuple[nn.Module, int]


class Wrong(Exception):  # noqa: N818 - a finding of the census
    """A model that was attached does not behave as attaching said."""


def components(blocks: Sequence[Block], *, skips: bool) -> list[str]:
    """The components that the blocks have; skips too, or branches only."""
    names = [
        c for c in COMPONENTS if c != "head" and c not in ONLY_REMOVED and (skips or not c.endswith("skip"))
    ]
    return [c for c in names if any(has_component(b, c) for b in blocks)]


def every_gate(blocks: Sequence[Block], value: float) -> tuple[Gate, ...]:
    """A gate for each branch and skip of the blocks."""
    return tuple(Gate(c, (b.index + 1,), value=value) for b in blocks for c in components([b], skips=True))


def gates_at_one(structure: Structure, inputs: Inputs) -> int:
    """(1) Every gate at 1: the model's output is bitwise the plain one."""

    def outputs() -> list[Tensor]:
        return [t for _, t in walk(structure.model(**inputs)) if t.is_floating_point()]

    with torch.no_grad():
        plain = outputs()
        with Editing(structure, gate_edits(structure, every_gate(structure.blocks, 1.0))):
            gated = outputs()
    if len(plain) != len(gated) or not all(map(torch.equal, plain, gated)):
        raise Wrong("gates of 1 change the output")
    return 1


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    out = norm(x)
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


class Checks:
    """The checks of one proved stack, on one batch of inputs for its model."""

    def __init__(self, structure: Structure, inputs: Inputs, others: Inputs) -> None:
        """`others`: inputs of the same form and shape with other numbers."""
        self.structure, self.model = structure, structure.model
        self.inputs, self.others = inputs, others
        self.streams = self.run(())

    # ---- running
    def run(
        self,
        gates: tuple[Gate, ...],
        inputs: Inputs | None = None,
        *,
        zeroed: tuple[int, nn.Module] | None = None,
        edits: Edits | None = None,
        change: tuple[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> Streams:
        """What enters and leaves each block. `zeroed`: (block, a module of it whose output is zeros there);
        `change`: (block, f), the stream that enters the block is replaced by f of it."""
        seen: Streams = {}
        chosen = edits or gate_edits(self.structure, gates)
        with torch.no_grad(), Editing(self.structure, chosen), self._watch(seen, change, zeroed):
            self.model(**(self.inputs if inputs is None else inputs))
        return seen

    @contextmanager
    def _watch(
        self,
        seen: Streams,
        change: tuple[int, Callable[[Tensor], Tensor]] | None,
        zeroed: tuple[int, nn.Module] | None,
    ) -> Iterator[None]:
        by_turn = {(self.structure.module(b), b.turn): b for b in self.structure.blocks}
        turns: dict[nn.Module, int] = {}
        entered: dict[int, Tensor] = {}

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            turn = turns.get(module, 0)
            turns[module] = turn + 1
            block = by_turn.get((module, turn))
            if block is None:
                return None
            given = (args, kwargs)
            if change is not None and change[0] == block.index:
                given = replace(given, block.entry, change[1](fetch(given, block.entry)))
            entered[block.index] = fetch(given, block.entry).clone()
            return given

        def after(module: nn.Module, args: Any, output: Any) -> None:
            block = by_turn.get((module, turns[module] - 1))
            if block is not None:
                seen[block.index] = (entered[block.index], fetch(output, block.exit).clone())

        def zero(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            here = zeroed is not None and zeroed[0] in entered and zeroed[0] not in seen
            return torch.zeros_like(output) if here else output

        with ExitStack() as hooks:
            if zeroed is not None:
                hooks.callback(zeroed[1].register_forward_hook(zero).remove)
            for module in {module for module, _ in by_turn}:
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after).remove)
            yield

    # ---- the checks
    def gates_at_one(self) -> int:
        """(1) Every gate at 1: the model's output is bitwise the plain one."""
        return gates_at_one(self.structure, self.inputs)

    def branches_off(self) -> int:
        """(2) Every branch off: each block hands on its input, or its norms of it."""
        count = 0
        gates = tuple(Gate(c, value=0.0) for c in components(self.structure.blocks, skips=False))
        for index, (x, out) in self.run(gates).items():
            block = self.structure.blocks[index]
            norms = [*block.norms, *(n for j in block.junctions for n in j.norms)]
            if block.scaled or any(n.turn < 0 for n in norms):
                continue  # which scaling, nothing here knows
            with torch.no_grad():
                for norm in norms:
                    x = _normed(self.model.get_submodule(norm.name), x)  # noqa: PLW2901
            if not torch.equal(x, out):
                raise Wrong(f"block {index + 1} with its branches off is not the identity or its norms")
            count += 1
        return count

    def zeroed_writers(self) -> int:
        """(3) A branch off is the plain model with the last linear map that writes it zeroed."""
        count = 0
        for block in self._ends():
            for branch in block.branches:
                if sum(b.kind == branch.kind for b in block.branches) > 1:
                    continue  # one gate holds both
                gone = self.run((Gate(branch.kind, (block.index + 1,)),))[block.index][1]
                for writer in self._writers(block, branch):
                    zeroed = self.run((), zeroed=(block.index, writer))[block.index][1]
                    if not torch.equal(gone, zeroed):
                        raise Wrong(
                            f"{branch.kind} of block {block.index + 1} is not what its last map writes"
                        )
                    count += 1
        return count

    def skips_off(self) -> int:
        """(4) A skip off: with the other branches off, plain = input + branch, and the branch alone goes on."""
        count = 0
        for block in self._ends():
            number = (block.index + 1,)
            for junction in block.junctions:
                kinds = list(dict.fromkeys(b.kind for b in junction.branches))
                component = _skip_of(junction)
                others = [Gate(c, number) for c in components([block], skips=False) if c not in kinds]
                if not has_component(block, component) or _several(block, junction) or block.scaled:
                    continue
                alone = self.run((*others, Gate(component, number)))[block.index][1]
                both = self.run(tuple(others))[block.index]
                if any(j.norms for j in block.junctions):
                    count += self._branch_through_norms(block, junction, others, alone)
                elif torch.equal(both[0] + alone, both[1]):
                    count += 1
                else:
                    raise Wrong(f"{component} off in block {block.index + 1} leaves not the branch alone")
        return count

    def _branch_through_norms(
        self, block: Block, junction: Junction, others: list[Gate], alone: Tensor
    ) -> int:
        after = block.junctions[block.junctions.index(junction) :]
        norms = [n for j in after for n in j.norms]
        if len(junction.branches) > 1 or any(n.turn < 0 for n in norms):
            return 0
        kept: list[Tensor] = []
        edits = gate_edits(self.structure, others)
        edits.at(junction.branches[0].site, _keep(kept))
        self.run((), edits=edits)
        with torch.no_grad():
            value = kept[-1].reshape(alone.shape)
            for norm in norms:
                value = _normed(self.model.get_submodule(norm.name), value)
        if not torch.equal(value, alone):
            raise Wrong(f"a skip off in block {block.index + 1} leaves not the norm of the branch alone")
        return 1

    def everything_off(self) -> int:
        """(5) Everything of a block off: what leaves it is the same for other inputs of the model."""
        count = 0
        for block in self._ends():
            gates = every_gate([block], 0.0)
            plain = self.run(gates)[block.index]
            noise = _noise_like(plain[0])
            other = [self.run(gates, change=(block.index, lambda x, noise=noise: noise))]  # type: ignore[misc]
            other.append(self.run(gates, self.others))
            for entered, left in (seen[block.index] for seen in other):
                if left.shape != plain[1].shape:  # lengths that the model predicts
                    continue
                if not torch.equal(left, plain[1]):
                    raise Wrong(f"block {block.index + 1} with everything off depends on its input")
                count += not torch.equal(entered, plain[0])
        return count

    def kinds(self) -> int:
        """(6) One token changed: attention and mixers move others, MLPs and cross-attention none."""
        count = 0
        for block in self._ends():
            no_tokens = {block.batch_axis, block.feature_axis % block.ndim, block.stream_axis}
            axes = [a for a in range(block.ndim) if a not in no_tokens]
            tokens = math.prod(self.streams[block.index][0].shape[a] for a in axes)
            present = components([block], skips=False)
            folded = block.batch_axis is None and self.streams[block.index][0].shape[axes[-1]] == 1
            if tokens < 2 or folded:
                continue  # one token in a sample
            for kind in present:
                others = tuple(Gate(c, (block.index + 1,)) for c in present if c != kind)
                moved = any(
                    self._moves(block, axes, token, others)
                    for token in dict.fromkeys((0, tokens // 2, tokens - 1))
                )
                if moved != (kind in {"attention", "mixer"}):
                    raise Wrong(
                        f"{kind} of block {block.index + 1} {'moves' if moved else 'does not move'} tokens"
                    )
                count += 1
        return count

    def _moves(self, block: Block, axes: list[int], token: int, others: tuple[Gate, ...]) -> bool:
        """Whether another value of one token of block input changes what leaves at another token."""
        x = self.streams[block.index][0]
        # Nearly the next token: a saturated pattern that looks at that one has to look at both.
        noise = x.roll(-1, axes[-1]) + 0.3 * _noise_like(x)
        numbers = torch.arange(math.prod(x.shape[a] for a in axes))
        at = (numbers == token).reshape([x.shape[a] if a in axes else 1 for a in range(x.ndim)])
        plain = self.run(others)[block.index][1]
        changed = self.run(others, change=(block.index, lambda y: torch.where(at, noise, y)))[block.index][1]
        difference = (plain - changed).abs().masked_fill(at, 0)
        return bool(difference.amax() > _noise(plain) * plain.abs().amax())

    def gates_per_sample(self) -> int:
        """(7) One gate per sample: each sample as in a run where all have its gate."""
        count = 0
        for block in self._ends():
            if block.batch_axis is None:
                continue
            samples = self.streams[block.index][0].shape[block.batch_axis]
            values = torch.linspace(0, 1, samples)
            for kind in components([block], skips=True):
                number = (block.index + 1,)
                mixed = self.run((Gate(kind, number, value=values),))[block.index][1]
                for i, value in enumerate(values.tolist()):
                    alone = self.run((Gate(kind, number, value=value),))[block.index][1]
                    a, b = mixed.select(block.batch_axis, i), alone.select(block.batch_axis, i)
                    # Experts sum in another order when other samples change.
                    if not torch.allclose(a, b, rtol=_noise(b), atol=_noise(b) * float(b.abs().amax())):
                        raise Wrong(f"{kind} of block {block.index + 1} gated per sample is another")
                    count += 1
        return count

    # ---- what they share
    def _ends(self) -> list[Block]:
        """The first block of each signature, and the last block."""
        first = {b.signature: b for b in reversed(self.structure.blocks)}
        chosen = {b.index: b for b in (*first.values(), self.structure.blocks[-1])}
        return [chosen[i] for i in sorted(chosen)]

    def _writers(self, block: Block, branch: Branch) -> list[nn.Module]:
        """Linear maps of the block whose zeroing leaves nothing of the branch."""
        module = self.structure.module(block)
        linear = (nn.Linear, nn.Conv1d, nn.Conv2d)
        maps = [m for m in module.modules() if isinstance(m, linear) or type(m).__name__ == "Conv1D"]
        found = []
        for candidate in maps:
            kept: list[Tensor] = []
            edits = Edits()
            edits.at(branch.site, _keep(kept))
            try:
                self.run((), edits=edits, zeroed=(block.index, candidate))
            except Exception:  # a map whose zeros the model cannot go on with, such as a router
                continue
            if kept and not any(k.any() for k in kept):
                found.append(candidate)
        return found[-1:]  # the last of them; earlier ones act through it


def _keep(into: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The edit that copies the operand and leaves it as it is."""

    def keep(x: Tensor) -> Tensor:
        into.append(x.clone())
        return x

    return keep


def _skip_of(junction: Junction) -> str:
    kinds = [b.kind for b in junction.branches]
    return ("attention" if "attention" in kinds else kinds[0]) + ".skip"


def _several(block: Block, junction: Junction) -> bool:
    """Whether one of its kinds is in another junction, too: one gate holds both."""
    kinds = {b.kind for b in junction.branches}
    return any(j is not junction and kinds & {b.kind for b in j.branches} for j in block.junctions)


def _noise_like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x) * x.std()


def _noise(x: Tensor) -> float:
    return max(1e-5, 8 * torch.finfo(x.dtype).eps)
