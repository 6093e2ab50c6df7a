"""What the parts of a run beside its curves may cost: chosen from shapes by one formula, the same on every machine.

A part takes the first of its choices, from what it does by default down to less and less, whose work is at most `PASSES`
plain passes over all samples of the run (a pass of at least `LEAST`), and whose memory is at most `MEMORY`. Work is
counted in multiply-adds of float32; of those of a half-precision model four count as one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from rc_probe.hooks.structure.structure import Structure

C = TypeVar("C")
PASSES = 1.0
LEAST = 7e11  # multiply-adds that count as one pass over all samples where it has fewer; some ten seconds of a core
MEMORY = 2**30  # bytes, beside the weights
DOUBLE = 2  # multiply-adds that one in float64 counts for
HALF = 1 / 4  # that one in half precision counts for
ABSOLUTE = 40  # and one absolute difference, which no matrix product makes

AT_MOST = "one plain pass over all samples (docs/large-models.md)"  # as notes say it


@dataclass(frozen=True)
class Shape:
    """weights: of all block calls; heads: of each attention layer; tokens: of a sample at most; samples: of the run.

    head: weights of what makes words of the last layer, 0 without; half: whether it computes in half precision
    """

    weights: int
    blocks: int
    dim: int
    heads: tuple[int, ...]
    tokens: int
    samples: int
    head: int = 0
    half: bool = False

    @classmethod
    def of(cls, structure: Structure, tokens: int, samples: int) -> Shape:
        """The shape of a run: `tokens` of its longest sample, how many `samples` it has."""
        weights = sum(p.numel() for block in structure.blocks for p in structure.module(block).parameters())
        heads = [
            b.ops[0].heads
            for block in structure.blocks
            for b in block.branches
            if b.kind == "attention" and b.ops
        ]
        half = next(
            (p.dtype.itemsize == 2 for p in structure.model.parameters() if p.is_floating_point()), False
        )
        return cls(
            weights,
            structure.depth,
            structure.dim,
            tuple(heads),
            tokens,
            samples,
            _head(structure.model),
            half,
        )

    def plain(self, tokens: int | None = None) -> float:
        """Multiply-adds of a plain pass of one sample through the blocks, of all its tokens or of so many."""
        tokens = tokens or self.tokens
        return self.weights * tokens + 2.0 * self.blocks * self.dim * tokens**2

    def halved(self, least: int = 16) -> list[int]:
        """Its tokens, half of them, a quarter … down to `least`."""
        found = [self.tokens]
        while found[-1] >= 2 * least:
            found.append(found[-1] // 2)
        return found


def first_that_fits(
    choices: Iterable[C],
    shape: Shape,
    work: Callable[[C], float],
    memory: Callable[[C], float] = lambda choice: 0,
    passes: float = PASSES,
) -> C | None:
    """The first choice that is within the limits; None where none is."""
    room = passes * max(LEAST, shape.samples * shape.plain() * (HALF if shape.half else 1))
    return next((one for one in choices if work(one) <= room and memory(one) <= MEMORY), None)


def _head(model: nn.Module) -> int:
    with contextlib.suppress(
        AttributeError, NotImplementedError
    ):  # base models, and what is none of the library
        weight = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
        return 0 if weight is None else int(weight.numel())
    return 0
