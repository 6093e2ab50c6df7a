"""Chained attention: how fast products of attention patterns along a path forget which token is which.

A path takes one head at some of the layers, l_1 < … < l_k, and the skip at the others; theorem 2.1 puts the
patterns of later layers on the left, P = P_{l_k} … P_{l_1}. A product of rank one, P = 1 p^T, gives every
token the same mixture. Source: Dong et al. 2021, theorem 2.1 and the figure of chained attention (whose code
multiplies in the opposite order).

P is held as its mean row p and what differs from it, P = 1 p^T + D. As the rows of a pattern A sum to one,
A P = 1 p^T + A D: D alone goes through the product, and is known to full relative precision however small it
becomes, where P itself would end at 1e-16. The patterns are computed in the precision of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rc_probe.data.batches import Batch
from rc_probe.hooks.edits.attention_patterns import patterns
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.edits.stream_taps import Tap, run_stopped
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.example_inputs import batch_size, with_no_cache
from rc_probe.hooks.structure.structure import Block, Branch, Site, Structure
from rc_probe.metrics.norms import composite_norm
from rc_probe.registry import CHAIN_METRICS
from rc_probe.results.tables import Row

BYTES = 2**26  # of running products at a time; the working memory is about seven times that
KEPT = 2**30  # bytes of patterns that are kept for the paths still to come
SAMPLES = 4
SQUARINGS = 8
NO_CHAIN = "Chained attention is left out for this model"


def chained_products(
    structure: Structure, batches: Iterable[Batch], *, samples: int = SAMPLES, draws: int = 25, seed: int = 0
) -> list[Row]:
    """Rows `length, metric, mean, std, median, low, high, count` of the table `chains`.

    On each of the first `samples` samples, `draws` paths of each length 1 … L: a set of layers uniformly,
    then a head of each uniformly; `low` and `high` are the quartiles over all of them, std has ddof 1. The
    metrics are those of CHAIN_METRICS, among real tokens only. The same seed gives the same paths, whatever
    the batches. Cross-attention is no part of a chain.

    The model runs once for each batch, up to its last layer, and its patterns are kept for all paths; where they
    take more than `KEPT` bytes it runs once for each `BYTES` of products, 8 tokens² bytes each. Memory: the patterns
    kept, and seven times `BYTES` (seven products, where these are more).

    Raises RcProbeError where patterns cannot be seen or cannot be multiplied (windows, attention sinks), and
    for fewer than one sample or draw.
    """
    if samples < 1 or draws < 1:
        raise RcProbeError(
            f"no path is drawn with samples={samples}, draws={draws}", where="chains", todo="Give 1 or more"
        )
    layers = _Layers(structure)
    generator = torch.Generator().manual_seed(seed)
    lengths: list[Tensor] = []
    values: dict[str, list[Tensor]] = {name: [] for name in CHAIN_METRICS}
    left = samples
    with measuring(structure.model):
        for batch in batches:
            here = min(left, layers.samples(batch))
            paths = torch.cat([draw_paths(layers.heads, draws, generator) for _ in range(here)])
            owner = torch.arange(here).repeat_interleave(len(paths) // here)  # the sample of each path
            one = _Pass(layers, batch, here)
            while len(paths):
                for name, found in one.run(paths, owner).items():
                    values[name].append(found.cpu())
                lengths.append((paths[: one.taken] > 0).sum(1))
                paths, owner = paths[one.taken :], owner[one.taken :]
            left -= here
            if not left:
                break
    return _rows(torch.cat(lengths), {name: torch.cat(found) for name, found in values.items()})


def draw_paths(heads: Sequence[int], draws: int, generator: torch.Generator) -> Tensor:
    """`draws` random paths of each length 1 … L, (L draws, L), shortest first; L = len(heads) layers.

    An entry is a head, from 1, or 0 for the skip. Layers are drawn without replacement, heads with.
    """
    L = len(heads)
    length = torch.arange(1, L + 1).repeat_interleave(draws)
    order = torch.rand(len(length), L, generator=generator).argsort(1)
    head = torch.rand(len(length), L, generator=generator, dtype=torch.float64) * torch.tensor(heads)
    return (head.long() + 1).where(order < length[:, None], 0)


# ---- products and what is measured of them


def identity(real: Tensor) -> tuple[Tensor, Tensor]:
    """The empty products (mean row (n, T), deviation (n, T, T)) among the real tokens, (n, T) bool."""
    token = real.double()
    mean = token / token.sum(1, keepdim=True)
    return mean, torch.diag_embed(token) - token[:, :, None] * mean[:, None]


def multiplied(pattern: Tensor, mean: Tensor, deviation: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """pattern (n, T, T), whose rows of real tokens sum to one over real tokens, times the products (from the left)."""
    moved = (pattern @ deviation) * real[..., None]
    shift = moved.sum(1) / real.sum(1, keepdim=True)
    return mean + shift, (moved - shift[:, None]) * real[..., None]


def distances(mean: Tensor, deviation: Tensor, real: Tensor) -> dict[str, Tensor]:
    """The CHAIN_METRICS of products P = 1 mean^T + deviation, (n,) each.

    mean (n, T), deviation (n, T, T) without mean over the real tokens, real (n, T) bool; zero elsewhere.
    """
    product = (mean[:, None] + deviation) * real[..., None]
    size = composite_norm(product)
    mean_row = composite_norm(deviation) / size
    rank_one = composite_norm(_beyond_rank_one(product, mean, deviation, real, mean_row)) / size
    # Rows of padding are zero, the mean of the real ones: from there no row is farther than from some other.
    spread = torch.cdist(deviation, deviation, p=1)
    dobrushin = (spread.amax((1, 2)) / 2).clamp(max=1)
    return {"rank_one": rank_one, "mean_row": mean_row, "dobrushin": dobrushin}


def _beyond_rank_one(
    product: Tensor, mean: Tensor, deviation: Tensor, real: Tensor, mean_row: Tensor
) -> Tensor:
    """P - s u v^T, with the first singular vectors u, v: (1 - u u^T) P (1 - v v^T), without cancellation."""
    v = first_eigenvector(product.mT @ product)  # (n, T, 1)
    u = product @ v
    u = u / torch.linalg.vector_norm(u, dim=1, keepdim=True)
    rest = deviation - u @ (u.mT @ deviation)
    rest = rest - (rest @ v) @ v.mT
    ones = real[..., None].double()
    left, right = ones - u * (u.mT @ ones), mean[..., None] - v * (v.mT @ mean[..., None])
    # Of third order in D, since 1^T D = 0: from 1e-8 down it is below the last bit, and what is computed is rounding.
    beyond: Tensor = rest + (left @ right.mT) * (mean_row > 1e-8)[:, None, None]
    return beyond


def first_eigenvector(square: Tensor) -> Tensor:
    """The eigenvector (n, T, 1) of the largest eigenvalue of symmetric matrices (n, T, T), none negative.

    A power of a matrix is of rank one as soon as the first eigenvalue has outgrown the second, which for products of
    patterns is soon. Where SQUARINGS are not enough the matrix is taken apart, at many times the work.
    """
    power, found = square, torch.empty_like(square[..., :1])
    left = torch.arange(len(square), device=square.device)
    for _ in range(SQUARINGS):
        power = power / power.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        power = power @ power  # of trace 1 where it is of rank one
        trace = power.diagonal(dim1=1, dim2=2).sum(1)
        done = trace > 1 - 1e-12
        column = power.diagonal(dim1=1, dim2=2).argmax(1)[:, None, None].expand(-1, power.shape[1], 1)
        found[left[done]] = power.gather(2, column)[done]
        power, left = power[~done], left[~done]
    if len(left):
        found[left] = torch.linalg.eigh(square[left]).eigenvectors[..., -1:]
    unit: Tensor = found / torch.linalg.vector_norm(found, dim=1, keepdim=True)
    return unit


# ---- along the layers of a model


class _Layers:
    """Where the heads of a path are: junctions with self-attention, each a layer; `heads` says how many each has."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.heads: list[int] = []
        self.places: dict[Site, tuple[int, int]] = {}  # (layer, number of its first head less one)
        for block in structure.blocks:
            for junction in block.junctions:
                first = 0
                for branch in junction.branches:
                    if branch.kind == "attention":
                        self.places[branch.site] = len(self.heads), first
                        first += self._heads(block, branch)
                if first:
                    self.heads.append(first)
        if not self.heads:
            raise RcProbeError(
                "it has no self-attention", where=type(structure.model).__name__, todo=NO_CHAIN
            )

    def samples(self, batch: Batch) -> int:
        size = batch_size(batch.inputs)
        if not size:
            what = "its inputs do not tell how many samples they hold"
            raise self.structure.error(self.structure.blocks[0], what, NO_CHAIN)
        return size

    def _heads(self, block: Block, branch: Branch) -> int:
        if len(branch.ops) != 1 or not branch.ops[0].heads:
            what = "has no heads that are known" if len(branch.ops) < 2 else "is of several operations"
            raise self.structure.error(block, f"its attention {what}", NO_CHAIN)
        return branch.ops[0].heads


class _Pass:
    """Products along paths (n, L), each on the sample that owns it, taken on layer by layer as the model runs.

    samples: of how many, the first of the batch, patterns are kept. The model runs again where these are too large.
    """

    def __init__(self, layers: _Layers, batch: Batch, samples: int) -> None:
        self.layers, self.batch, self.samples = layers, batch, samples
        self.kept: list[tuple[Block, Branch, Tensor]] = []

    def run(self, paths: Tensor, owner: Tensor) -> dict[str, Tensor]:
        """The metrics of the products of the first paths, as many as fit into `BYTES`; `taken` says how many."""
        self.paths, self.owner, self.taken = paths, owner, 0
        structure = self.layers.structure
        model = structure.model
        for each in self.kept:
            self._multiply(*each)
        if not self.kept:
            with Tap(structure, lambda layer, x: None, stop=True), patterns(structure, self._on_pattern):
                run_stopped(lambda: model(**with_no_cache(model, self.batch.inputs)))
        return distances(self.mean, self.deviation, self.real)

    def _on_pattern(self, block: Block, branch: Branch, pattern: Tensor) -> None:
        """pattern: (batch, heads, tokens, tokens)."""
        if branch.kind != "attention":
            return
        if not self.taken:
            self._start(pattern)
        self._check_shape(block, pattern)
        self._multiply(block, branch, pattern)
        if self.keep:
            self.kept.append((block, branch, pattern[: self.samples].clone()))

    def _multiply(self, block: Block, branch: Branch, pattern: Tensor) -> None:
        if not self.taken:
            self._start(pattern)
        layer, first = self.layers.places[branch.site]
        head = self.paths[:, layer] - first  # from 1
        here = ((head > 0) & (head <= pattern.shape[1])).nonzero().squeeze(1)
        real = self.real[here]
        rows = (self.owner[here].to(pattern.device), head[here].to(pattern.device) - 1)
        one = pattern[rows].to(real.device).double()  # (m, T, T)
        one = one * (real[:, :, None] & real[:, None])
        tolerance = max(1e-5, 4 * torch.finfo(pattern.dtype).eps)
        if not ((one.sum(-1) - 1).abs() <= tolerance)[real].all():
            what = "rows of its attention patterns do not sum to one over the tokens"
            raise self.layers.structure.error(block, what, NO_CHAIN)
        self.mean[here], self.deviation[here] = multiplied(one, self.mean[here], self.deviation[here], real)

    def _start(self, pattern: Tensor) -> None:
        T = pattern.shape[-1]
        self.taken = min(len(self.paths), max(1, BYTES // (8 * T * T)))
        kept = sum(self.layers.heads) * self.samples * T * T * pattern.element_size()
        self.keep = kept <= KEPT and self.taken < len(self.paths) and not self.kept
        self.paths, self.owner = (t[: self.taken].to(pattern.device) for t in (self.paths, self.owner))
        mask = self.batch.mask
        if mask is None:
            mask = torch.ones(batch_size(self.batch.inputs), T, dtype=torch.bool)
        self.real = mask.bool().to(pattern.device)[self.owner]
        self.mean, self.deviation = identity(self.real)

    def _check_shape(self, block: Block, pattern: Tensor) -> None:
        T = self.real.shape[1]
        if pattern.shape[0] != batch_size(self.batch.inputs) or pattern.shape[2:] != (T, T):
            what = "its attention patterns are not over all tokens of a sample"
            raise self.layers.structure.error(block, what, f"{NO_CHAIN}: patterns of windows have no product")


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
