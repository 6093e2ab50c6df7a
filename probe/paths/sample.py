"""Sampled paths: terms of the frozen decomposition, drawn as Dong et al. 2021 (section 3.2) draw theirs.

Paths of one length are drawn uniformly: which blocks, and a head in each. One draw is a head for every
block; all the paths through these heads, of every length and layer subset, go through the model together
by the recurrence of the exact decomposition. So they share their beginnings and ends, the layer subsets
are strata that are all taken (each of the C(L, k) by as many paths), and chance is left in the heads alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.edits.stream_taps import StreamDone, Tap, run_stopped
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.frozen.frozen_pass import Frozen, Hop, Step, frozen, head_of, hop_edits
from rc_probe.hooks.frozen.parts import Ledger, Parts
from rc_probe.hooks.structure.example_inputs import with_no_cache
from rc_probe.hooks.structure.structure import Structure

from .decompose import first_axes, hops
from .path_proofs import prove_heads, prove_steps


@dataclass(frozen=True)
class Sampled:
    """Estimates of the parts of each length, one for each repeat.

    parts: (repeats, lengths, batch, tokens, dim) of the last hidden state; the mean over repeats estimates
        Decomposition.length(k), without bias. `stream` the same after the last block
    paths: how many paths of each length one repeat has
    """

    parts: Tensor
    stream: Tensor
    paths: tuple[int, ...]


def sample(
    model: nn.Module | Structure,
    batch: dict[str, Any],
    *,
    paths: int = 20,
    repeats: int = 5,
    seed: int = 0,
    max_length: int | None = None,
    count_mlp: bool = False,
    stack: str | None = None,
    blocks: str | None = None,
) -> Sampled:
    """Unbiased estimates of what paths of each length carry, from `paths` draws of heads in each repeat.

    Every path of a length is as likely as any other. The draws of one repeat are independent, and so are the
    repeats. Raises RcProbeError as `decompose` does, and where heads cannot be told apart.
    """
    structure = (
        model if isinstance(model, Structure) else find_structure(model, batch, stack=stack, blocks=blocks)
    )
    choices = hops(structure, count_mlp=count_mlp)
    prove_heads(structure, batch, choices)
    drawn = draw_heads(choices, paths * repeats, seed)
    turns = torch.arange(repeats).repeat_interleave(paths)  # to which repeat a draw belongs
    sums: list[Tensor] = []  # of hidden states and of streams, (repeats, lengths, batch, tokens, dim)
    at_once = _at_once(structure, batch, len(choices))
    for chunk, turn in zip(drawn.split(at_once, dim=1), turns.split(at_once), strict=True):
        result = _sweep(structure, batch, choices, chunk, max_length)
        for i, found in enumerate(first_axes(result, structure.blocks[-1])[::-1]):
            each = found[:-1].unflatten(0, (-1, len(turn))).transpose(0, 1)  # (draws, lengths, …)
            if len(sums) == i:
                sums.append(each.new_zeros(repeats, *each.shape[1:]))
            sums[i].index_add_(0, turn.to(each.device), each)
    subsets = [math.comb(len(choices), k) * paths for k in range(len(choices) + 1)]
    return Sampled(sums[0] / paths, sums[1] / paths, tuple(subsets))


def draw_heads(choices: list[Step], draws: int, seed: int) -> Tensor:
    """A head for every step, uniform and independent: (steps, draws), numbered from 0 over the step's hops."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(step.heads, (draws,), generator=generator) for step in choices])


def _sweep(
    structure: Structure, batch: dict[str, Any], choices: list[Step], drawn: Tensor, max_length: int | None
) -> Frozen:
    """All the paths through the heads of each draw, by length. drawn (steps, draws)."""
    ledger = Ledger(fixed=0, group=drawn.shape[1], longest=max_length)

    def on_hop(number: int, hop: Hop, x: Parts) -> Parts:
        step = choices[number]
        mine = (
            head_of(step, hop, drawn[number]).any(1) * step.heads
        )  # each stands for all the heads of the step
        return x.made(lambda p: ledger.longer(_times(p, mine)))

    def chosen(number: int, hop: Hop) -> Tensor:
        return head_of(choices[number], hop, drawn[number])

    edits = hop_edits(structure, choices, on_hop, chosen=chosen)
    return frozen(structure, batch, ledger, lambda x: x.expand(drawn.shape[1], *x.shape), edits)


def terms(
    model: nn.Module | Structure,
    batch: dict[str, Any],
    paths: Tensor,
    *,
    count_mlp: bool = False,
    stack: str | None = None,
    blocks: str | None = None,
) -> Tensor:
    """What each of given paths carries from the input to the last hidden state: (paths, batch, tokens, dim).

    paths: (paths, steps) of whole numbers, 0 for the skip and h for head h (from 1). The terms of all
    (H+1)^L paths, with the bias of `decompose`, add up to the output.
    """
    structure = (
        model if isinstance(model, Structure) else find_structure(model, batch, stack=stack, blocks=blocks)
    )
    choices = hops(structure, count_mlp=count_mlp)
    check_paths(structure, choices, paths)
    prove_heads(structure, batch, choices)
    prove_steps(structure, batch, choices)
    ledger = Ledger(fixed=len(paths))
    heads = paths.T - 1  # (steps, paths), -1 for the skip

    def on_hop(number: int, hop: Hop, x: Parts) -> Parts:
        return x.made(lambda p: _times(p, head_of(choices[number], hop, heads[number]).any(1)))

    def chosen(number: int, hop: Hop) -> Tensor:
        return head_of(choices[number], hop, heads[number])

    def on_others(number: int, x: Parts) -> Parts:
        return x.made(lambda p: _times(p, heads[number] < 0))

    edits = hop_edits(structure, choices, on_hop, on_others=on_others, chosen=chosen)
    result = frozen(structure, batch, ledger, lambda x: x.expand(len(paths), *x.shape), edits)
    return first_axes(result, structure.blocks[-1])[1][:-1]


def check_paths(structure: Structure, choices: list[Step], paths: Tensor) -> None:
    """RcProbeError for what are no paths of this model."""
    limits = torch.tensor([step.heads for step in choices])
    if paths.ndim != 2 or paths.shape[1] != len(choices) or bool(((paths < 0) | (paths > limits)).any()):
        raise RcProbeError(
            f"these are no paths: {len(choices)} numbers each, 0 for the skip or a head, are needed",
            where=type(structure.model).__name__,
            todo=f"Heads are numbered 1 to {', '.join(map(str, dict.fromkeys(limits.tolist())))}",
        )


def _times(parts: Tensor, factor: Tensor) -> Tensor:
    """Each draw's channels times its factor (draws,): they lie side by side at every length."""
    factor = factor.to(parts.device, parts.dtype).repeat(len(parts) // len(factor))
    return parts * factor.reshape(-1, *[1] * (parts.ndim - 1))


def _at_once(structure: Structure, batch: dict[str, Any], steps: int) -> int:
    """How many draws go through the model together, so that they take about a gigabyte."""
    wide = (
        4 * 8 * 3
    )  # bytes for each number of the stream: an MLP is four times as wide, and a step keeps three of it
    return max(1, 2**30 // (stream_size(structure, batch) * wide * (steps + 1)))


def stream_size(structure: Structure, batch: dict[str, Any]) -> int:
    """How many numbers enter block 1. The inputs do not tell: pixels and samples of a sound are no tokens."""
    found = [0]

    def first(layer: int, x: Tensor) -> None:
        found.append(x.numel())
        raise StreamDone

    with measuring(structure.model), Tap(structure, first):
        run_stopped(lambda: structure.model(**with_no_cache(structure.model, batch)))
    return max(1, found[-1])
