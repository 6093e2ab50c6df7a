"""The attention patterns of the first samples, read once for all measurements that want them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rc_probe.data.batches import Batch, part_of
from rc_probe.engine import fitted_mask, refuse_packed
from rc_probe.hooks.edits.attention_patterns import patterns
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.edits.stream_taps import Tap, run_stopped
from rc_probe.hooks.structure.example_inputs import batch_size, with_no_cache
from rc_probe.hooks.structure.structure import Block, Branch, Structure

KEPT = (
    2**29
)  # bytes of patterns that are held together, and again of those that are kept for the next measurement
NO_PATTERNS = "Its attention is left out"


@dataclass(frozen=True)
class Pattern:
    """What one attention op did on one sample, real tokens alone.

    weights: (windows, heads, queries, keys); one window where the model attends over all tokens
    seen: which keys each query may see, bool, of the same shape, with one head where all see the same
    whole: whether the queries are all real tokens of the stream; keys: the place of each key among the tokens
    """

    block: Block
    branch: Branch
    weights: Tensor
    seen: Tensor
    whole: bool

    @property
    def heads(self) -> int:
        return self.weights.shape[1]


@dataclass(frozen=True)
class Sample:
    """The patterns of one sample in the order in which they were made; number: of the sample in the data, from 0.

    ids: of its real tokens, by kind of branch (`attention`, `cross`: those that are attended to), where they are known
    """

    number: int
    tokens: int
    patterns: list[Pattern]
    ids: dict[str, Tensor] = field(default_factory=dict)


class FirstPatterns:
    """Reads the patterns of the first samples, and keeps those that fit for whoever asks next.

    >>> read = FirstPatterns(structure, batches)                  # doctest: +SKIP
    >>> for sample in read.samples(4):                            # doctest: +SKIP
    ...     print(sample.number, len(sample.patterns))

    Each sample goes through the model once, up to the last layer.
    """

    def __init__(self, structure: Structure, batches: Iterable[Batch]) -> None:
        self.structure, self.batches = structure, batches
        self.heads = sum(op.heads for block in structure.blocks for b in block.branches for op in b.ops)
        self._kept: dict[
            int | None, tuple[int, list[Sample]]
        ] = {}  # by tokens of a sample: how many were asked for, and they

    def samples(self, count: int, tokens: int | None = None) -> Iterator[Sample]:
        """The first `count` samples, or their first `tokens`. Raises RcProbeError where patterns cannot be seen."""
        asked, kept = self._kept.get(tokens, (0, []))
        if asked >= count:
            yield from kept[:count]
            return
        found: list[Sample] | None = []
        for sample in self._read(count, tokens):
            found = _with(found, sample)
            yield sample
        if found is not None:
            self._kept[tokens] = count, found

    def _read(self, count: int, tokens: int | None) -> Iterator[Sample]:
        with measuring(self.structure.model):
            for batch in self.batches:
                refuse_packed(self.structure, batch)
                size, start = min(count, self._size(batch)), 0
                while start < size:
                    rows = slice(start, min(size, start + self._at_once(batch, tokens)))
                    yield from _Pass(self.structure, part_of(batch, rows, tokens)).run()
                    start = rows.stop
                count -= size
                if not count:
                    return

    def _size(self, batch: Batch) -> int:
        size = batch_size(batch.inputs)
        if not size:
            what = "its inputs do not tell how many samples they hold"
            raise self.structure.error(self.structure.blocks[0], what, NO_PATTERNS)
        return size

    def _at_once(self, batch: Batch, tokens: int | None) -> int:
        """Samples whose patterns are held together; one, where the inputs do not tell how many tokens it has."""
        ids = batch.inputs.get("decoder_input_ids", batch.inputs.get("input_ids"))
        if ids is None:
            return 1
        return max(1, KEPT // (4 * max(1, self.heads) * (tokens or ids.shape[1]) ** 2))


def _with(found: list[Sample] | None, sample: Sample) -> list[Sample] | None:
    """The samples and one more; None from where they are too many to keep."""
    if found is None:
        return None
    found.append(sample)
    held = sum(p.weights.numel() * p.weights.element_size() for one in found for p in one.patterns)
    return found if held <= KEPT else None


class _Pass:
    """One pass of a few samples, which ends behind the last layer."""

    def __init__(self, structure: Structure, batch: Batch) -> None:
        self.structure, self.batch = structure, batch
        self.size = batch_size(batch.inputs)
        self.found: list[tuple[Block, Branch, Tensor, Tensor]] = []
        self.seen: Tensor | None = None  # of the op that runs
        self.real: Tensor | None = None
        self.length = 0  # tokens of the stream

    def run(self) -> list[Sample]:
        model = self.structure.model
        tap = Tap(self.structure, self._on_stream, stop=True)
        self.tap = tap
        with tap, patterns(self.structure, self._on_pattern, self._on_mask):
            run_stopped(lambda: model(**with_no_cache(model, self.batch.inputs)))
        return [self._sample(number) for number in range(self.size)]

    def _on_stream(self, layer: int, x: Tensor) -> None:
        if layer == 0:
            self.real, self.length = fitted_mask(self.batch, self.structure, self.tap, x), x.shape[1]
            if self.real is not None and self.real.shape[1] != self.length:
                what = f"the mask has {self.real.shape[1]} tokens and the stream {self.length}, so that its attention patterns are not over all tokens of a sample"
                raise self.structure.error(self.structure.blocks[0], what, NO_PATTERNS)

    def _on_mask(self, block: Block, branch: Branch, seen: Tensor) -> None:
        self.seen = seen

    def _on_pattern(self, block: Block, branch: Branch, weights: Tensor) -> None:
        seen = self.seen
        if weights.shape[0] != self.size and self.size > 1:
            what = f"its attention has {weights.shape[0]} patterns for {self.size} samples"
            raise self.structure.error(block, what, f"{NO_PATTERNS}: give --batch-size 1")
        assert seen is not None
        self.found.append((block, branch, weights.clone(), seen.expand(len(weights), *seen.shape[1:])))

    def _sample(self, number: int) -> Sample:
        found = [self._pattern(number, *one) for one in self.found]
        real = None if self.real is None else self.real[number].bool()
        tokens = self.length if real is None else int(real.sum())
        return Sample(self.batch.start + number, tokens, found, dict(self._ids(number, found)))

    def _pattern(self, number: int, block: Block, branch: Branch, weights: Tensor, seen: Tensor) -> Pattern:
        """Of real tokens: the mask's, or keys of another stream that some query may see."""
        rows = slice(number, number + 1) if self.size > 1 else slice(None)
        weights, seen = weights[rows], seen[rows]
        whole = len(weights) == 1 and weights.shape[2] == self.length
        if whole and self.real is not None and not bool(self.real[number].all()):
            real = self.real[number].bool().to(weights.device)
            weights, seen = weights[:, :, real], seen[:, :, real]
            if branch.kind == "attention" and weights.shape[3] == self.length:
                weights, seen = weights[..., real], seen[..., real]
        if branch.kind == "cross" and len(weights) == 1:
            keys = seen.any(2).any(1)[0]
            weights, seen = weights[..., keys], seen[..., keys]
        if bool((weights.masked_fill(seen, 0) != 0).any()):
            what = "its attention gives weight to keys that its mask does not let it see"
            raise self.structure.error(block, what, NO_PATTERNS)
        if len(weights) > 1:
            # Shifted windows are told apart by -100 in place of a mask, which leaves next to nothing.
            seen = seen & (weights > torch.finfo(weights.dtype).tiny).any(1, keepdim=True)
        return Pattern(block, branch, weights, seen, whole)

    def _ids(self, number: int, found: list[Pattern]) -> Iterator[tuple[str, Tensor]]:
        """Token ids of the keys, where the model reads tokens."""
        inputs = self.batch.inputs
        own = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        if isinstance(own, Tensor) and own.shape[1] == self.length:
            yield (
                "attention",
                own[number] if self.real is None else own[number][self.real[number].to(own.device)],
            )
        other, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        keys = next((p.weights.shape[-1] for p in found if p.branch.kind == "cross"), None)
        if isinstance(other, Tensor) and keys is not None:
            ids = other[number] if mask is None else other[number][mask[number].bool()]
            if len(ids) == keys:
                yield "cross", ids
