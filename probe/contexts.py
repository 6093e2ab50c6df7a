"""`attach` and `ablate`: context managers on a model that the user holds."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rc_probe import engine
from rc_probe.data.batches import Batch
from rc_probe.hooks.attach import find_structure, refuse_mps
from rc_probe.hooks.edits.edits import Editing, Edits
from rc_probe.hooks.edits.forward_calls import Generation, given_to, hearing_generate, listening
from rc_probe.hooks.edits.gates import Gate
from rc_probe.hooks.edits.model_state import Level
from rc_probe.hooks.edits.stream_taps import Tap, each_stream
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.module_calls import copies_told
from rc_probe.hooks.structure.structure import CandidateBlock, Structure
from rc_probe.hooks.structure.unwrap import unwrapped
from rc_probe.hooks.undo import Living
from rc_probe.interventions.grammar import interventions
from rc_probe.interventions.intervention import Intervention
from rc_probe.measures.coarse_rounding import noise_on
from rc_probe.metrics.layer_curves import Curves, Measured, gather_curves
from rc_probe.models.structure_table import structure_rows
from rc_probe.processes.world import World
from rc_probe.registry import select
from rc_probe.results.tables import FRAMES, RUN_TABLES

from .heard import Heard, mask_of_stream, no_fit, tokens_of_prompt

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_METRICS = ("residual", "residual_bulk", "residual_frobenius", "cosine")


def ablate(
    model: nn.Module,
    *what: str | Gate | Intervention | Sequence[str | Gate | Intervention],
    inputs: dict[str, Any] | None = None,
    readings: Iterable[dict[str, Any]] | None = None,
    stack: str | None = None,
    blocks: str | None = None,
) -> Ablating:
    """A context in which `model` runs without the named parts; afterwards it is as it was.

    `model`: any torch module, compiled ones and sentence-transformers' included.
    `what`: specs such as "mlp@7", "attention.skip@3-5", "head@2:5", "mlp@4=0.5", "block@5-8", or `Gate`s, whose
    value may be a tensor (batch,) of one gate per sample, or lists of them. Blocks and heads are numbered from 1.
    `inputs`: keyword arguments of a forward pass of two or more samples, to attach with; made from
    the config when left out. `readings`: keyword arguments of forward passes on the user's data, which the plain
    model runs first for what goes by it (`rank@2=4:data`). `stack` names one of several stacks (an encoder, a tower), `blocks` the
    blocks by hand (`encoder.layer.*`). Inside, compiled and fused code runs operation by operation, and only the
    thread that opened the context may run the model. A backward pass that recomputes blocks (gradient
    checkpointing around a block) belongs inside, too.

    Raises RcProbeError when the model cannot be proved, or has no such part; while it runs, when a gated
    block itself checkpoints what it computes, as those of transformers do, or is traced; at the end, when no block
    that it changes has run. Copies and pickles of the model that are made inside are without the context, and a
    warning says so.

    >>> with ablate(model, "mlp@7"):          # doctest: +SKIP
    ...     evaluate(model)
    """
    asked = interventions(*what)
    if not asked.interventions:
        raise RcProbeError("nothing to ablate", where="ablate", todo="Name a part, such as 'mlp@7'")
    by_data = [each for each in asked.interventions if each.on_data]
    if by_data and readings is None:
        why = f"{by_data[0].label} goes by the queries and keys of the plain model, and no data is given"
        raise RcProbeError(why, where="ablate", todo="Give readings=[…]: the inputs of forward passes")
    structure = _prove(model, inputs, stack, blocks)
    engine.prepare(structure, _given(readings or ()), by_data)
    return Ablating(structure, asked.edits(structure))


def _given(readings: Iterable[dict[str, Any]]) -> Iterator[Batch]:
    """Passes that a user describes. Their attention mask says which tokens are real."""
    for number, inputs in enumerate(readings):
        mask = inputs.get("attention_mask")
        yield Batch(inputs, mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None, number)


class Ablating(Editing):
    """What `ablate` returns."""

    def __init__(self, structure: Structure, edits: Edits) -> None:
        super().__init__(structure, edits)
        self._ran: set[int] = set()

    @contextmanager
    def opened(self) -> Iterator[None]:
        with super().opened(), copies_told(self.model, "ablate"):
            yield

    def enter(self, block: CandidateBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._ran.add(block.index)
        return super().enter(block, args, kwargs)

    def __exit__(self, kind: Any = None, *exc: Any) -> None:
        self.close()
        idle = sorted(self.wanted - self._ran)
        if kind is not None or not idle:
            return
        blocks, where = ", ".join(str(index + 1) for index in idle), type(self.model).__name__
        if self._ran:
            warnings.warn(
                f"{where}: block {blocks} did not run inside of ablate, so nothing was changed there",
                stacklevel=2,
            )
            return
        raise RcProbeError(
            f"none of the blocks that ablate changes ran inside of it ({blocks})",
            where=where,
            todo="Run this very model inside, in this process: copies, traces and workers that started before are not changed",
        )


def attach(
    model: nn.Module,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    mask: Tensor | str | None = "auto",
    inputs: dict[str, Any] | None = None,
    stack: str | None = None,
    blocks: str | None = None,
) -> Attached:
    """A context that measures every layer's stream while the user runs the model; `.frame()` has the numbers.

    `model` is as in `ablate`. `mask` says which tokens are real: "auto" takes the attention mask
    (batch, tokens) that the outermost call of the model, or of its `forward`, is given (of a decoder that gets labels
    alone: those that are no -100); None says that nothing is padded, a tensor (batch, tokens) of the stream holds for
    every call. What a model pads by itself is no token. Statistics accumulate over whole passes, in float64.
    No samples are passes of one token, those that go on from a filled cache, that fail or drop blocks, what gradient
    checkpointing recomputes, rows of fewer than two real tokens, and passes of rc-probe's own; `left_out` counts
    passes by the reason. Of `generate` each prompt is one sample, whatever follows. The stream is what the user's hooks
    on blocks make of it. Of models whose blocks hand on several streams side by side `.frame()` is of all together, a
    token's one after the other, and `.streams_frame()` of each. Floors of quantised models are measured on `inputs`. `inputs`, `stack` and `blocks` are as in `ablate`.

    Raises RcProbeError when the model cannot be proved, and, while it runs, when a batch of several
    texts comes without a mask, as one packed sequence, or a prompt in chunks.

    >>> with attach(model) as probe:          # doctest: +SKIP
    ...     evaluate(model)
    >>> probe.frame()                         # doctest: +SKIP
    """
    structure = _prove(model, inputs, stack, blocks, several=True)
    return Attached(structure, metrics, mask, noise=noise_on(structure, inputs))


def _prove(
    model: nn.Module,
    inputs: dict[str, Any] | None,
    stack: str | None,
    blocks: str | None,
    *,
    several: bool = False,
) -> Structure:
    return find_structure(unwrapped(model), inputs, stack=stack, blocks=blocks, several=several)


class Attached(Living):
    """A model being measured; see `attach`. `structure` is what was proved about it.

    `left_out` counts passes that are no samples, by the reason. With `stop`, passes end after the last layer by
    StreamDone (see Tap). `noise` is that of quantised models, by stream and layer (see Curves).
    """

    def __init__(
        self,
        structure: Structure,
        metrics: Sequence[str],
        mask: Tensor | str | None,
        *,
        stop: bool = False,
        noise: Mapping[int, dict[int, float]] | None = None,
    ) -> None:
        self.structure, self.given, self.stop = structure, mask, stop
        if not (mask is None or isinstance(mask, Tensor) or mask == "auto"):
            todo = 'Give "auto", None, or a tensor (batch, tokens)'
            raise RcProbeError(f"{mask!r:.80} is no mask", where="mask", todo=todo)
        several = structure.streams if structure.streams > 1 else 0
        self.by_stream = {  # 0: all together
            number: Curves(select(metrics), noise=(noise or {}).get(number, {}))
            for number in range(several + 1)
        }
        self.left_out: Counter[str] = Counter()
        self._heard: Heard | None = None  # the pass that is running
        self._measured: dict[int, list[Measured]] = {}  # its layers, in order: of each of `by_stream`
        self._prompted: weakref.ref[Generation] | None = None  # the call of `generate` whose prompt was seen

    def __enter__(self) -> Attached:
        refuse_mps(self.structure.model)  # it may have moved since
        return super().__enter__()

    @property
    def curves(self) -> Curves:
        """Of the stream; of several streams all together."""
        return self.by_stream[0]

    def _lives(self) -> Iterator[None]:
        holders = [self.structure.model.get_submodule(name) for name in self.structure.ancestors]
        heard = Level(observes=True).heard
        self._tap = Tap(self.structure, self._on_stream, stop=self.stop)
        with (
            self._tap,
            listening(holders, self._called, self._returned, heard),
            hearing_generate(),
            copies_told(self.structure.model, "attach"),
        ):
            yield

    # ---- the calls around the blocks, and the streams of these

    def _called(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._heard is None or not self._heard.calls:
            self._heard, self._measured = Heard(self.structure), {}
            generation = self._heard.generation
            if generation is not None and generation.chunked:
                raise RcProbeError(
                    f"generate reads the prompt in chunks of {generation.chunked} tokens, none of which is the whole sample",
                    where=type(self.structure.model).__name__,
                    todo="Generate without prefill_chunk_size, or measure the prompts by a plain pass",
                )
        self._heard.hear(module, given_to(module.forward, args, kwargs))
        self._heard.calls += 1

    def _returned(self, module: nn.Module) -> None:
        """A module that holds all blocks returned or raised."""
        heard = self._heard
        if heard is None:
            return
        heard.calls = max(heard.calls - 1, 0)
        if heard.calls:
            return
        if heard.skip:
            self.left_out[heard.skip] += 1
        elif len(self._measured) <= self.structure.depth:
            self.left_out[f"ran {heard.blocks} of {self.structure.depth} blocks"] += 1
        self._heard, self._measured = None, {}

    def _on_stream(self, layer: int, x: Tensor) -> None:
        """Layers count once 0 to L came in turn: a pass that failed on the way leaves nothing behind."""
        heard = self._heard
        if heard is None:  # nobody called the modules around the blocks
            heard = Heard(self.structure)
        heard.blocks += layer > 0
        if layer == 0:
            self._measured = {}
            self._begin(heard, x)
        if layer != len(self._measured):
            return
        self._measured[layer] = [] if heard.skip else self._read(heard, layer, x)
        if layer < self.structure.depth:
            return
        if heard.skip:
            return
        for each, curves in enumerate(self.by_stream.values()):
            for number, measured in self._measured.items():
                curves.add(number, measured[each])
            curves.samples += len(x) if curves.mask is None else len(curves.mask)

    def _begin(self, heard: Heard, x: Tensor) -> None:
        generation = heard.generation
        if generation is not None and not heard.skip:
            if self._prompted is not None and self._prompted() is generation:
                heard.skip = "were further steps of generate"
            self._prompted = weakref.ref(generation)
        if not heard.skip and x.shape[1] < 2:
            heard.skip = "were of one token"
        if not heard.skip:
            mask = self._mask(heard, x)
            for curves in self.by_stream.values():
                curves.mask = mask

    def _read(self, heard: Heard, layer: int, x: Tensor) -> list[Measured]:
        if isinstance(self.given, str):
            x, _ = tokens_of_prompt(heard, x)
        parts = (x, *each_stream(x, self.structure.streams)) if len(self.by_stream) > 1 else (x,)
        return [curves.read(layer, part) for curves, part in zip(self.by_stream.values(), parts, strict=True)]

    def _mask(self, heard: Heard, x: Tensor) -> Tensor | None:
        """(batch, tokens) bool of the stream; None: all tokens are real."""
        if isinstance(self.given, str):
            return mask_of_stream(heard, x, self._tap)
        if self.given is not None and self.given.shape != x.shape[:2]:
            raise no_fit(self.structure, self.given, x, "or run texts one by one")
        return None if self.given is None else self.given.to(x.device, torch.bool)

    def frame(self, *, gather: bool = False) -> pd.DataFrame:
        """Columns layer, metric, mean, std (ddof 1, over samples; NaN for one), count, floor.

        With `gather`, of the samples of all processes of the torch.distributed group: every process must call
        it, also one that had no sample, and gets the same frame. Samples that a padding sampler handed out
        twice count twice.

        Raises RcProbeError when the model has not run inside the context, with `gather` in any process.
        """
        return self._framed("attach", {0: self.curves}, gather)

    def streams_frame(self, *, gather: bool = False) -> pd.DataFrame:
        """As `frame`, of each of the streams that blocks hand on side by side: column stream, from 1, before the others.

        Of a model with one stream it has that one.
        """
        each = {n: curves for n, curves in self.by_stream.items() if n} or {1: self.curves}
        return self._framed("attach_streams", each, gather)

    def _framed(self, name: str, curves: dict[int, Curves], gather: bool) -> pd.DataFrame:
        if gather:
            curves = gather_curves(curves, World.given().gather)
        rows = [row for n in curves for row in curves[n].rows(**{"stream": n} if n else {})]
        if not any(row["count"] for row in rows):
            raise self._nothing()
        return FRAMES[name].frame(rows)

    def _nothing(self) -> RcProbeError:
        where, todo = (
            type(self.structure.model).__name__,
            "Run the model inside `with attach(model) as probe:`",
        )
        if not self.left_out and not self.curves.samples:
            return RcProbeError("no forward pass was seen", where=where, todo=todo)
        why = [f"{count} {reason}" for reason, count in self.left_out.items()]
        if self.curves.samples:
            why.append(f"{self.curves.samples} rows have fewer than two real tokens")
        seen = f"none of the passes that were seen is a sample: {', '.join(why)}"
        return RcProbeError(
            seen,
            where=where,
            todo="Run whole texts of two or more tokens, in evaluation mode, without a filled cache",
        )

    def structure_frame(self) -> pd.DataFrame:
        """The blocks and branches that were proved, one row per branch."""
        return RUN_TABLES["structure"].frame(structure_rows(self.structure))
