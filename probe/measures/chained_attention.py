"""Chained attention: how fast products of attention patterns along a path forget which token is which.

A path takes one head at some of the layers, l_1 < … < l_k, and the skip at the others; theorem 2.1 puts the
patterns of later layers on the left, P = P_{l_k} … P_{l_1}. A product of rank one, P = 1 p^T, gives every
token the same mixture. Source: Dong et al. 2021, theorem 2.1 and the figure of chained attention (whose code
multiplies in the opposite order). Only real tokens are rows and columns of a pattern here.

P is held as its mean row p and what differs from it, P = 1 p^T + D. As the rows of a pattern A sum to one,
A P = 1 p^T + A D: D alone goes through the product, and is known to full relative precision however small it
becomes, where P itself would end at 1e-16. The patterns are computed in the precision of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rc_probe.budget import ABSOLUTE, AT_MOST, DOUBLE, Shape, first_that_fits
from rc_probe.data.batches import Batch
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import Block, Branch, Site, Structure
from rc_probe.registry import CHAIN_METRICS
from rc_probe.results.tables import Row

from .attention.first_patterns import FirstPatterns, Pattern, Sample
from .chained_products import SQUARINGS, distances, draw_paths, multiplied, single

BYTES = 2**22  # of products that are measured at a time: they stay near the processor
NO_CHAIN = "Chained attention is left out for this model"


@dataclass(frozen=True)
class Chosen:
    """How much is measured: on the first `samples`, of their first `tokens` (None: all), `draws` paths of each length.

    spread: the Dobrushin coefficient, too, whose distances of all pairs of rows take tokens³ operations a product
    """

    samples: int = 4
    draws: int = 25
    tokens: int | None = None
    spread: bool = True

    @property
    def metrics(self) -> list[str]:
        return [name for name in CHAIN_METRICS if self.spread or name != "dobrushin"]


FEWER = (Chosen(), Chosen(spread=False), *(Chosen(4, draws, spread=False) for draws in (12, 6, 3)))
FEWEST = (Chosen(2, 3, spread=False), Chosen(1, 3, spread=False))


def affordable(shape: Shape, *, cut: bool) -> Chosen | None:
    """The first of `FEWER` within the limits of rc_probe.budget, on all tokens; else on half of them, a quarter …; else of
    `FEWEST`.

    cut: whether the first tokens of a sample can be had alone
    """
    tokens = shape.halved() if cut else [shape.tokens]
    choices = [replace(one, tokens=t) for t in tokens for one in FEWER]
    choices += [replace(one, tokens=tokens[-1]) for one in FEWEST]
    found = first_that_fits(choices, shape, lambda one: _work(shape, one), lambda one: _memory(shape, one))
    return replace(found, tokens=None) if found and found.tokens == shape.tokens else found


def said(chosen: Chosen) -> list[str]:
    """A note where something was cut."""
    if chosen == Chosen():
        return []
    tokens = f" of {chosen.tokens} tokens" if chosen.tokens else ""
    without = "" if chosen.spread else ", without the Dobrushin coefficient"
    return [
        f"Chained attention: {chosen.draws} paths of each length on {chosen.samples} sample{'s' * (chosen.samples > 1)}"
        f"{tokens}{without}, so that it costs no more than {AT_MOST}."
    ]


def _work(shape: Shape, chosen: Chosen) -> float:
    """Of every product half of the layers' patterns, and for its distances up to nine squares and two products."""
    layers, tokens = len(shape.heads), chosen.tokens or shape.tokens
    each = DOUBLE * ((layers + 1) / 2 + SQUARINGS + 3) + (ABSOLUTE if chosen.spread else 0)
    products = chosen.samples * chosen.draws * layers * each * float(tokens) ** 3
    return products + chosen.samples * shape.plain(tokens)


def _memory(shape: Shape, chosen: Chosen) -> float:
    """The patterns of a sample in float32, and ten products."""
    return (4.0 * sum(shape.heads) + 80) * (chosen.tokens or shape.tokens) ** 2


def chained_products(
    structure: Structure,
    batches: Iterable[Batch],
    chosen: Chosen | None = None,
    *,
    seed: int = 0,
    read: FirstPatterns | None = None,
) -> list[Row]:
    """Rows `length, metric, mean, std, median, low, high, count` of the table `chains`.

    On each of the first samples, paths of each length 1 … L, as many as `chosen` says: a set of layers uniformly, then a head
    of each uniformly; `low` and `high` are the quartiles over all of them, std has ddof 1. The metrics are those of
    CHAIN_METRICS, among real tokens only. The same seed gives the same paths, whatever the batches. Cross-attention is no
    part of a chain.

    read: of these batches, where others want their patterns, too. Each sample goes through the model once, up to the last layer.

    Raises RcProbeError where patterns cannot be seen or cannot be multiplied (windows, attention sinks), and
    for fewer than one sample or draw.
    """
    chosen = chosen or Chosen()
    if chosen.samples < 1 or chosen.draws < 1:
        what = f"no path is drawn with samples={chosen.samples}, draws={chosen.draws}"
        raise RcProbeError(what, where="chains", todo="Give 1 or more")
    layers = _Layers(structure)
    generator = torch.Generator().manual_seed(seed)
    lengths: list[Tensor] = []
    values: dict[str, list[Tensor]] = {name: [] for name in chosen.metrics}
    read = read or FirstPatterns(structure, batches)
    for sample in read.samples(chosen.samples, chosen.tokens):
        paths = draw_paths(layers.heads, chosen.draws, generator)
        lengths.append((paths > 0).sum(1))
        different, which = paths.unique(dim=0, return_inverse=True)  # few heads have few paths
        made = [*_measured(layers.of(sample), different, chosen)]
        for name, kept in values.items():
            kept.append(torch.cat([found[name] for found in made]).cpu()[which])
    return _rows(torch.cat(lengths), {name: torch.cat(found) for name, found in values.items()})


def _measured(sample: list[Tensor], paths: Tensor, chosen: Chosen) -> Iterator[dict[str, Tensor]]:
    """The metrics of the products along `paths`, some at a time."""
    T = sample[0].shape[-1]
    for some in paths.split(max(1, BYTES // (8 * T * T))):
        made = [_product(sample, path) for path in some.tolist()]
        mean, deviation = (torch.stack(each) for each in zip(*made, strict=True))
        yield distances(mean, deviation, spread=chosen.spread)


def _product(sample: list[Tensor], path: list[int]) -> tuple[Tensor, Tensor]:
    first, *others = (pattern[head - 1].double() for pattern, head in zip(sample, path, strict=True) if head)
    product = single(first)
    for pattern in others:
        product = multiplied(pattern, *product)
    return product


# ---- along the layers of a model


class _Layers:
    """Where the heads of a path are: junctions with self-attention, each a layer; `heads` says how many each has."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.heads: list[int] = []
        self.places: dict[Site, int] = {}
        for block in structure.blocks:
            for junction in block.junctions:
                own = [branch for branch in junction.branches if branch.kind == "attention"]
                self.places |= {branch.site: len(self.heads) for branch in own}
                if own:
                    self.heads.append(sum(self._heads(block, branch) for branch in own))
        if not self.heads:
            raise RcProbeError(
                "it has no self-attention", where=type(structure.model).__name__, todo=NO_CHAIN
            )

    def of(self, sample: Sample) -> list[Tensor]:
        """The patterns of a sample, layer by layer (heads, tokens, tokens)."""
        found: list[list[Tensor]] = [[] for _ in self.heads]
        for pattern in sample.patterns:
            if pattern.branch.kind == "attention":
                found[self.places[pattern.branch.site]].append(self._square(pattern))
        return [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in found]

    def _heads(self, block: Block, branch: Branch) -> int:
        if len(branch.ops) != 1 or not branch.ops[0].heads:
            what = "has no heads that are known" if len(branch.ops) < 2 else "is of several operations"
            raise self.structure.error(block, f"its attention {what}", NO_CHAIN)
        return branch.ops[0].heads

    def _square(self, pattern: Pattern) -> Tensor:
        if (
            not pattern.whole
            or len(pattern.weights) > 1
            or pattern.weights.shape[2] != pattern.weights.shape[3]
        ):
            what = "its attention patterns are not over all tokens of a sample"
            raise self.structure.error(
                pattern.block, what, f"{NO_CHAIN}: patterns of windows have no product"
            )
        weights = pattern.weights[0]
        tolerance = max(1e-5, 4 * torch.finfo(weights.dtype).eps)
        if not ((weights.sum(-1, dtype=torch.float64) - 1).abs() <= tolerance).all():
            what = "rows of its attention patterns do not sum to one over the tokens"
            raise self.structure.error(pattern.block, what, NO_CHAIN)
        return weights


def _rows(lengths: Tensor, values: dict[str, Tensor]) -> list[Row]:
    rows = []
    for name, all_values in values.items():
        for length in lengths.unique().tolist():
            x = all_values[lengths == length]
            low, median, high = x.quantile(x.new_tensor([0.25, 0.5, 0.75])).tolist()
            rows.append({
                "length": length, "metric": name, "mean": float(x.mean()),
                "std": float(x.std()) if len(x) > 1 else math.nan,
                "median": median, "low": low, "high": high, "count": len(x),
            })  # fmt: skip
    return rows
