"""`attach` and `ablate`: context managers on a model that the user holds."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rc_probe.hooks.attach import find_structure, refuse_mps
from rc_probe.hooks.edits.edits import Editing
from rc_probe.hooks.edits.forward_calls import Listening
from rc_probe.hooks.edits.gates import Gate
from rc_probe.hooks.edits.stream_taps import Tap
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.structure import Structure
from rc_probe.hooks.structure.tape import walk
from rc_probe.hooks.structure.unwrap import unwrapped
from rc_probe.interventions.grammar import interventions
from rc_probe.interventions.intervention import Intervention
from rc_probe.metrics.layer_curves import Curves, Measured, gather_curves
from rc_probe.models.structure_table import structure_rows
from rc_probe.processes.world import World
from rc_probe.registry import select
from rc_probe.results.tables import FRAMES, RUN_TABLES

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_METRICS = ("residual", "residual_bulk", "residual_frobenius", "cosine")


def ablate(
    model: nn.Module,
    *what: str | Gate | Intervention | Sequence[str | Gate | Intervention],
    inputs: dict[str, Any] | None = None,
    stack: str | None = None,
    blocks: str | None = None,
) -> Editing:
    """A context in which `model` runs without the named parts; afterwards it is as it was.

    `model`: any torch module, compiled ones and sentence-transformers' included.
    `what`: specs such as "mlp@7", "attention.skip@3-5", "head@2:5", "mlp@4=0.5", "block@5-8", or `Gate`s, whose
    value may be a tensor (batch,) of one gate per sample, or lists of them. Blocks and heads are numbered from 1.
    `inputs`: keyword arguments of a forward pass of two or more samples, to attach with; made from
    the config when left out. `stack` names one of several stacks (an encoder, a tower), `blocks` the
    blocks by hand (`encoder.layer.*`). Inside, compiled and fused code runs operation by operation, and only the
    thread that opened the context may run the model. A backward pass that recomputes blocks (gradient
    checkpointing around a block) belongs inside, too.

    Raises RcProbeError when the model cannot be proved, or has no such part; while it runs, when a gated
    block itself checkpoints what it computes, as those of transformers do.

    >>> with ablate(model, "mlp@7"):          # doctest: +SKIP
    ...     evaluate(model)
    """
    asked = interventions(*what)
    if not asked.interventions:
        raise RcProbeError("nothing to ablate", where="ablate", todo="Name a part, such as 'mlp@7'")
    structure = _prove(model, inputs, stack, blocks)
    return Editing(structure, asked.edits(structure))


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
    (batch, tokens) that the model, or its `forward`, is called with; None says that nothing is padded, a
    tensor (batch, tokens) holds for every call. Statistics
    accumulate over whole passes, in float64; passes over one token (generation with a cache), passes that
    fail and what gradient checkpointing recomputes are left out. `inputs`, `stack` and `blocks` are as
    in `ablate`.

    Raises RcProbeError when the model cannot be proved, and, while it runs, when a batch of several
    texts comes without a mask or as one packed sequence.

    >>> with attach(model) as probe:          # doctest: +SKIP
    ...     evaluate(model)
    >>> probe.frame()                         # doctest: +SKIP
    """
    return Attached(_prove(model, inputs, stack, blocks), metrics, mask)


def _prove(
    model: nn.Module, inputs: dict[str, Any] | None, stack: str | None, blocks: str | None
) -> Structure:
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise RcProbeError(
            "it runs copies of the model in threads of their own, which no context can follow",
            where="DataParallel",
            todo="Give the model inside, model.module, and run that",
        )
    return find_structure(unwrapped(model), inputs, stack=stack, blocks=blocks)


class Attached(AbstractContextManager["Attached"]):
    """A model being measured; see `attach`. `structure` is what was proved about it.

    With `stop`, passes end after the last layer by StreamDone (see Tap).
    """

    def __init__(
        self, structure: Structure, metrics: Sequence[str], mask: Tensor | str | None, *, stop: bool = False
    ) -> None:
        self.structure, self.given, self.stop = structure, mask, stop
        if not (mask is None or isinstance(mask, Tensor) or mask == "auto"):
            todo = 'Give "auto", None, or a tensor (batch, tokens)'
            raise RcProbeError(f"{mask!r:.80} is no mask", where="mask", todo=todo)
        self.curves = Curves(select(metrics))
        self._seen: Tensor | None = None
        self._pass: dict[int, Measured] = {}  # layers of the pass that is running, in order
        self._exit = ExitStack()

    def __enter__(self) -> Attached:
        refuse_mps(self.structure.model)  # it may have moved since
        self._exit.enter_context(Tap(self.structure, self._on_stream, stop=self.stop))
        holders = [self.structure.model.get_submodule(name) for name in self.structure.ancestors]
        self._exit.enter_context(Listening(holders, self._see_mask, self._end_pass))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._exit.close()

    def _see_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """The outermost call comes first; inner ones may pass a mask on in a form of their own."""
        try:
            given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        except TypeError:  # the call itself will say what is wrong with it
            given = kwargs
        given = {**given, **given.get("kwargs", {})}
        self._refuse_packed(module, given)
        mask = given.get("decoder_attention_mask" if "decoder_input_ids" in given else "attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self._seen = mask != 0
        elif isinstance(given.get("input_ids"), Tensor) or module is self.structure.model:
            self._seen = None

    def _end_pass(self, module: nn.Module) -> None:
        """A module that holds all blocks returned or raised: what is not whole by now is dropped."""
        self._pass, self._seen = {}, None

    def _refuse_packed(self, module: nn.Module, given: dict[str, Any]) -> None:
        """A stream without a batch axis is one sample to every metric, so it must be one."""
        block = self.structure.blocks[0]
        lengths = given.get("cu_seq_lens_q")  # what flash attention needs for several texts in one row
        if isinstance(lengths, Tensor) and len(lengths) > 2:
            raise self.structure.error(
                block,
                f"its stream packs {len(lengths) - 1} texts into one sequence",
                "Pad and mask them instead (sentence-transformers: unpad_inputs=False)",
            )
        main = given.get(getattr(module, "main_input_name", "input_ids"))
        if main is None and module is self.structure.model:
            main = next((t for _, t in walk(given)), None)
        if block.batch_axis is not None or not isinstance(main, Tensor) or not main.ndim:
            return
        grids = [t for name, t in given.items() if "grid" in name and isinstance(t, Tensor)]
        count = len(grids[0] if grids else main)  # of images, whose patches are packed
        if count > 1:
            raise self.structure.error(
                block, f"its stream packs all {count} samples into one sequence", "Run samples one by one"
            )

    def _on_stream(self, layer: int, x: Tensor) -> None:
        """Layers count once 0 to L came in turn: a pass that failed on the way leaves nothing behind."""
        if layer == 0:
            self._pass = {}
        if layer != len(self._pass):
            return
        self._pass[layer] = {} if x.shape[1] == 1 else self._read(layer, x)
        if layer < self.structure.depth:
            return
        for number, measured in self._pass.items():
            self.curves.add(number, measured)
        self._pass = {}
        if x.shape[1] > 1:
            self.curves.samples += x.shape[0]

    def _read(self, layer: int, x: Tensor) -> Measured:
        self.curves.mask = self._mask(x)
        return self.curves.read(layer, x)

    def _mask(self, x: Tensor) -> Tensor | None:
        mask = self._seen if isinstance(self.given, str) else self.given
        if mask is not None:
            if mask.shape != x.shape[:2]:
                raise RcProbeError(
                    f"the mask {tuple(mask.shape)} does not fit the stream's {x.shape[0]} samples of {x.shape[1]} tokens",
                    where=type(self.structure.model).__name__,
                    todo="Give attach(model, mask=…) the mask of the stream, or run texts one by one",
                )
            return mask.to(x.device, torch.bool)
        text = getattr(self.structure.model, "main_input_name", "input_ids") == "input_ids"
        if text and isinstance(self.given, str) and x.shape[0] > 1:
            raise RcProbeError(
                f"a batch of {x.shape[0]} texts came without an attention mask, so padding cannot be told from text",
                where=type(self.structure.model).__name__,
                todo="Pass attention_mask= (batch, tokens) to the model, run texts one by one, or say attach(model, mask=…): "
                "the mask of every batch, or None if nothing is padded",
            )
        return None

    def frame(self, *, gather: bool = False) -> pd.DataFrame:
        """Columns layer, metric, mean, std (ddof 1, over samples; NaN for one), count, floor.

        With `gather`, of the samples of all processes of the torch.distributed group: every process must call
        it, also one that had no sample, and gets the same frame. Samples that a padding sampler handed out
        twice count twice.

        Raises RcProbeError when the model has not run inside the context, with `gather` in any process.
        """
        curves = self.curves
        if gather:
            curves = gather_curves({"": curves}, World.given().gather)[""]
        rows = curves.rows()
        if not rows:
            raise RcProbeError(
                "no forward pass was seen", where=type(self.structure.model).__name__,
                todo="Run the model inside `with attach(model) as probe:`",
            )  # fmt: skip
        return FRAMES["attach"].frame(rows)

    def structure_frame(self) -> pd.DataFrame:
        """The blocks and branches that were proved, one row per branch."""
        return RUN_TABLES["structure"].frame(structure_rows(self.structure))
