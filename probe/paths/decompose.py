"""The exact decomposition of the last hidden state by path length: all (H+1)^L paths in one pass.

With attention patterns, norm scales and activation gates held at their values (hooks/freeze.py) a block's
attention junction makes `S_k + A(S_{k-1})` of the parts S of the stream, where A is its attention branch:
theorem 2.1 of Dong et al. 2021, its paths grouped by length, and norms and MLPs part of the linear map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.edits.single_precision import single_precision
from rc_probe.hooks.edits.stream_taps import Tap, batch_first, run_stopped
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.frozen.frozen_pass import TOLERANCE, Frozen, Step, frozen, hop_edits, steps
from rc_probe.hooks.frozen.parts import NO_PARTS, Ledger, Parts
from rc_probe.hooks.structure.example_inputs import with_no_cache
from rc_probe.hooks.structure.structure import Block, Structure

from .path_counts import path_counts
from .sources import decodes, in_parts

Outputs = dict[int, Any] | None
INPUT, TOKENS, POSITIONS, BIAS = "input", "tokens", "positions", "bias"


@dataclass(frozen=True)
class Decomposition:
    """The last hidden state as a sum of parts.

    parts: (channels, batch, tokens, dim); their sum is the hidden state
    sources, lengths: of each channel. A length is None where a source is not told apart by length
    longest: the last length that stands alone; what is longer is one part, of length longest + 1
    counts: how many paths each length has, exactly
    stream: the same channels of the stream after the last block, before any final norm
    mask: (batch, tokens) of real tokens, None if all are
    error: max |sum of the parts - output| / max |output|, of the model's own output at real tokens
    """

    parts: Tensor
    sources: tuple[str, ...]
    lengths: tuple[int | None, ...]
    longest: int
    counts: tuple[int, ...]
    stream: Tensor
    mask: Tensor | None
    error: float
    stream_value: Tensor = field(repr=False)
    value: Tensor = field(repr=False)

    def total(self) -> Tensor:
        """The sum of all parts, (batch, tokens, dim): the last hidden state."""
        return self.parts.sum(0)

    def length(self, k: int) -> Tensor:
        """What paths of length k carry from the input, (batch, tokens, dim); biases are not in it."""
        return self.parts[self.channels(k)].sum(0)

    def source(self, name: str) -> Tensor:
        """What comes from one source over paths of all lengths, (batch, tokens, dim).

        Sources: "input" and "bias"; with by_source=True "tokens", "positions" and "bias". "positions" is
        what joins the tokens before block 1: position and type embeddings, class tokens, biases there.
        """
        if name not in self.sources:
            known = ", ".join(dict.fromkeys(self.sources))
            raise RcProbeError(
                f"no source is called {name!r}",
                where="paths",
                todo=f"There are {known} (by_source=True tells more)",
            )
        return self.parts[[i for i, s in enumerate(self.sources) if s == name]].sum(0)

    def channels(self, k: int) -> list[int]:
        """The channels of length k that come from the input."""
        if not 0 <= k <= self.most:
            known = f"Lengths are 0 to {self.most}" if self.most >= 0 else "Leave by_length out"
            raise RcProbeError(f"no path has length {k}", where="paths", todo=known)
        return [
            i for i, (s, n) in enumerate(zip(self.sources, self.lengths, strict=True)) if n == k and s != BIAS
        ]

    @property
    def most(self) -> int:
        """The largest length of a part; -1 where lengths are not told apart."""
        return max((n for n in self.lengths if n is not None), default=-1)

    @property
    def bias(self) -> Tensor:
        return self.source(BIAS)


def decompose(
    model: nn.Module | Structure,
    batch: dict[str, Any],
    *,
    stack: str | None = None,
    blocks: str | None = None,
    max_length: int | None = None,
    count_mlp: bool = False,
    by_source: bool = False,
    by_length: bool = True,
    plain: Tensor | None = None,
    outputs: Outputs = None,
) -> Decomposition:
    """The parts of the last hidden state by path length, and by source.

    Parameters
    ----------
    model: a transformer, or its proved Structure
    batch: keyword arguments of its forward pass
    stack, blocks: as in `rc_probe.attach`
    max_length: paths above this length are one part; None tells all lengths apart
    count_mlp: an MLP is a hop of a path, as a head is; else it is part of the linear map that skips carry
    by_source: tell tokens, positions and biases apart at every length (three times the work). Else biases are one
        part, and the input another at every length
    by_length: False gives each source one part, the sum over all lengths. That costs about five plain forwards by
        source, whatever the depth
    plain: what the result is checked against: the stream after the last block in a plain pass on `batch`,
        (batch, tokens, dim). This pass is run where None is given, or one of another shape
    outputs: gets what each block returned, by its number, whole

    One pass; the work is about (L + 2) / 2 plain forwards for L blocks, and memory that of L + 2 batches.
    A bias on a branch belongs to the source `bias` at the length of the paths that leave by this branch.

    Raises RcProbeError where the model cannot be proved or frozen, or the parts do not add up to its output:
    within 1e-5 of the largest part in float32, 2e-6 in float64. `error` is relative to the output itself.
    """
    if not isinstance(batch, Mapping):
        todo = "Give the keyword arguments of a forward pass, a dict of tensors"
        raise RcProbeError(f"{type(batch).__name__} is no batch", where="batch", todo=todo)
    structure = (
        model if isinstance(model, Structure) else find_structure(model, batch, stack=stack, blocks=blocks)
    )
    if max_length is not None and max_length < 0:
        raise RcProbeError(f"{max_length} is no length", where="max_length", todo="Give 0 or more")
    choices = hops(structure, count_mlp=count_mlp)
    fixed, group = _names(by_source, by_length)
    ledger = Ledger(len(fixed), len(group), constant=0, longest=max_length)
    edits = _longer(structure, choices, ledger)
    result = (_by_source if by_source else _by_length)(structure, batch, ledger, edits, outputs)
    check_sum(structure, result)
    _check_value(structure, batch, result, plain)
    return _collect(structure, batch, choices, fixed, group, ledger, result)


def hops(structure: Structure, *, count_mlp: bool = False) -> list[Step]:
    """The steps of the paths; RcProbeError where there is none."""
    choices = steps(structure, count_mlp=count_mlp)
    if not choices:
        raise structure.error(structure.blocks[0], "no block has attention or another mixer", NO_PARTS)
    return choices


def _names(by_source: bool, by_length: bool) -> tuple[list[str], list[str]]:
    """The sources of the channels that stand first, and of those that every length has."""
    if by_source:
        every = [TOKENS, POSITIONS, BIAS]
        return ([], every) if by_length else (every, [])
    return ([BIAS], [INPUT]) if by_length else ([BIAS, INPUT], [])


def _by_length(
    structure: Structure, batch: dict[str, Any], ledger: Ledger, edits: Edits, outputs: Outputs = None
) -> Frozen:
    return frozen(
        structure, batch, ledger, lambda x: torch.stack([torch.zeros_like(x), x]), edits, outputs=outputs
    )


def frozen_lengths(structure: Structure, batch: dict[str, Any], choices: list[Step]) -> Frozen:
    """The frozen pass of `decompose`: first what comes from biases, then every length."""
    ledger = Ledger(fixed=1, group=1, constant=0)
    return _by_length(structure, batch, ledger, _longer(structure, choices, ledger))


def _longer(structure: Structure, choices: list[Step], ledger: Ledger) -> Edits:
    """What leaves by a hop is one hop longer."""
    return hop_edits(
        structure, choices, lambda number, hop, x: x.made(ledger.longer, fresh=bool(ledger.group))
    )


def _by_source(
    structure: Structure, batch: dict[str, Any], ledger: Ledger, edits: Edits, outputs: Outputs
) -> Frozen:
    """Followed from the embeddings on: what joins the stream before block 1 are positions, after it biases."""
    ledger.constant = 1

    def start(stream: Tensor) -> Tensor:
        if not isinstance(stream, Parts):
            raise structure.error(
                structure.blocks[0], "its input does not follow the embeddings of the tokens",
                "Its positions cannot be told from its tokens: leave by_source out",
            )  # fmt: skip
        parts = stream.parts
        ledger.constant = 2
        return parts

    inputs, mode = in_parts(structure, batch, ledger)
    return frozen(structure, inputs, ledger, start, edits, mode, outputs)


def _collect(
    structure: Structure,
    batch: dict[str, Any],
    choices: list[Step],
    fixed: list[str],
    group: list[str],
    ledger: Ledger,
    result: Frozen,
) -> Decomposition:
    groups = (len(result.hidden.parts) - len(fixed)) // len(group) if group else 0
    sources = (*fixed, *group * groups)
    lengths = (*[None] * len(fixed), *(k for k in range(groups) for _ in group))
    longest = groups - 1 if ledger.longest is None else min(groups - 1, ledger.longest)
    counts = path_counts([step.heads for step in choices])
    if groups - 1 > longest:
        counts = [*counts[: longest + 1], sum(counts[longest + 1 :])]

    stream, hidden = first_axes(result, structure.blocks[-1])
    mask = batch.get("decoder_attention_mask" if decodes(structure, batch) else "attention_mask")
    real = mask.bool() if isinstance(mask, Tensor) and mask.shape == hidden.shape[1:3] else None
    if isinstance(mask, Tensor) and real is None and not bool(mask.all()):
        raise RcProbeError(
            f"its stream has {hidden.shape[2]} tokens and the mask {mask.shape[1]}, so padding cannot be told from text",
            where=type(structure.model).__name__,
            todo="Measure texts one by one: --batch-size 1",
        )
    real = real if real is None else real.to(hidden.device)
    error = max(_error(x[:-1], x[-1], real) for x in (hidden, stream))
    return Decomposition(
        hidden[:-1], sources, lengths, longest, tuple(counts), stream[:-1], real, error,
        stream[-1], hidden[-1],
    )  # fmt: skip


def first_axes(result: Frozen, block: Block) -> tuple[Tensor, Tensor]:
    """Of the stream and of the hidden state the parts and, last, their sum, each (batch, tokens, dim)."""
    hidden = result.hidden
    stream = torch.stack([batch_first(part, block) for part in (*result.stream.parts, result.stream.value)])
    if hidden is result.stream:
        return stream, stream
    if result.named and hidden.ndim == 3 and (block.feature_axis == -1 or hidden.shape[-1] == block.dim):
        return stream, torch.cat([hidden.parts, hidden.value[None]])
    return stream, torch.stack([batch_first(part, block) for part in (*hidden.parts, hidden.value)])


def check_sum(structure: Structure, result: Frozen) -> None:
    """RcProbeError where the parts do not add up to the output within rounding, which is that of the largest part.

    Parts may be far larger than their sum: those of padding, and of features that a model keeps large.
    """
    for x in {id(x): x for x in (result.stream, result.hidden)}.values():
        largest = max(float(x.value.abs().max()), float(x.parts.abs().max()))
        error = float((x.parts.sum(0) - x.value).abs().max()) / (largest or 1.0)
        limit = TOLERANCE[x.dtype]
        if not error <= limit:
            raise RcProbeError(
                f"the parts of its paths add up to its output only within {error:.1e} of the largest, and {limit:.0e} "
                "is rounding",
                where=type(structure.model).__name__,
                todo="Try --dtype float64; else its paths cannot be told apart",
            )


def _error(parts: Tensor, value: Tensor, mask: Tensor | None) -> float:
    """max |sum of the parts - value| / max |value|, over real tokens."""
    off, size = (parts.sum(0) - value).abs(), value.abs()
    if mask is not None:
        off, size = off[mask], size[mask]
    return float(off.max()) / (float(size.max()) or 1.0)


def _last_stream(structure: Structure, batch: dict[str, Any]) -> Tensor:
    """The stream after the last block in a plain pass, (batch, tokens, dim)."""
    found: list[Tensor] = []

    def keep(layer: int, x: Tensor) -> None:
        if layer == structure.depth:
            found.append(x)

    with measuring(structure.model), single_precision(structure.model), Tap(structure, keep, stop=True):
        run_stopped(lambda: structure.model(**with_no_cache(structure.model, batch)))
    return found[0]


def _check_value(structure: Structure, batch: dict[str, Any], result: Frozen, plain: Tensor | None) -> None:
    """RcProbeError where the stream of the frozen pass is not that of a plain one within rounding.

    Every operation of the model ran on the whole stream, so that they differ only where its code writes into views.
    """
    value = batch_first(result.stream.value, structure.blocks[-1])
    if plain is None or plain.shape != value.shape:
        plain = _last_stream(structure, batch)
    error = float((value - plain).abs().max() / plain.abs().max().clamp_min(1e-300))
    if not error <= TOLERANCE[plain.dtype]:
        raise RcProbeError(
            f"with its stream in parts it gives another output, by {error:.1e}",
            where=type(structure.model).__name__,
            todo=NO_PARTS,
        )
