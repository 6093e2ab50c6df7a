"""`Monitor`: the same samples measured again and again while a model trains, which goes on as if it were not."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rc_probe.contexts import DEFAULT_METRICS, Attached
from rc_probe.data.batches import batches, long_enough
from rc_probe.data.samples import load_samples
from rc_probe.hooks.attach import find_structure, refuse_mps
from rc_probe.hooks.edits.model_state import full_precision, measuring
from rc_probe.hooks.edits.stream_taps import run_stopped
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.structure.example_inputs import with_no_cache
from rc_probe.hooks.structure.unwrap import check_module, unwrapped
from rc_probe.hooks.undo import undoing
from rc_probe.measures.coarse_rounding import noise_on
from rc_probe.models.load import hold_model
from rc_probe.models.model_inputs import input_device
from rc_probe.options import at_least
from rc_probe.registry import METRICS, select
from rc_probe.results.curves import BULK, RESIDUAL, collapsed
from rc_probe.results.tables import FRAMES, Row

if TYPE_CHECKING:
    import pandas as pd

LABELS = ("labels", "label", "label_ids")


class Monitor:
    """Measures the residual at every layer of a model in training, every so many steps.

    Parameters
    ----------
    model: a transformers model, one of sentence-transformers, or any module with `data` as batches;
        compiled or wrapped in DistributedDataParallel as it may be
    data: what `rc_probe.probe` takes (texts, images, a file, a dataset, …; None: the bundled samples), or
        batches: a list or DataLoader of dicts of tensors, keyword arguments of the model. Padding is told by
        their `attention_mask`; those of a module that is no transformers model may go without
    every: measure once in so many calls of `step()`
    metrics: names, see `rc_probe.METRICS`; the residual, also of the bulk, is always among them
    processor: tokenizer or image processor, where the model does not tell
    samples, length, batch_size, special_tokens, column: as in `rc_probe.probe`
    stack, blocks: as in `rc_probe.attach`

    The samples are read once. A measurement runs in evaluation mode, without gradients and autocast of the
    loop's own, on forked random numbers (torch, numpy, Python): training goes on bitwise as without it.
    With several processes each measures all samples of its copy; weights that are sharded are refused.

    Raises RcProbeError when the model cannot be proved or the data do not fit it.

    >>> monitor = Monitor(model, texts, every=100)      # doctest: +SKIP
    >>> for batch in loader:                            # doctest: +SKIP
    ...     train_on(batch)
    ...     if metrics := monitor.step():
    ...         log(metrics)
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        every: int = 100,
        metrics: Sequence[str] = DEFAULT_METRICS,
        processor: Any = None,
        samples: int = 32,
        length: int = 128,
        batch_size: int = 8,
        special_tokens: bool = True,
        column: str | None = None,
        stack: str | None = None,
        blocks: str | None = None,
    ) -> None:
        for name, value in (("every", every), ("samples", samples), ("batch_size", batch_size)):
            at_least(name, value, 1)
        at_least("length", length, 2)
        self.every, self.metrics = every, select({RESIDUAL, BULK, *metrics})
        self.steps, self._rows = 0, list[Row]()
        self.batches: list[
            tuple[dict[str, Any], Any]
        ]  # the model's inputs, and what Attached is given as mask
        inner = _whole(model)
        refuse_mps(inner)
        with same_random():
            data, first = _peek(data)
            if _is_batch(first):
                self.model: Any = inner
                self.batches = [
                    (batch, _mask_of(inner, batch)) for batch in _first_rows(data, samples, inner)
                ]
            else:
                loaded = hold_model(
                    model if unwrapped(model) is inner else inner, processor, stack=stack, blocks=blocks
                )
                found = load_samples(
                    data, modality=loaded.modality, column=column, samples=samples,
                    fits=long_enough(loaded, special_tokens),
                )  # fmt: skip
                made = batches(
                    found, loaded, length=length, batch_size=batch_size, special_tokens=special_tokens
                )
                self.model, stack = loaded.model, loaded.stack
                self.batches = [(dict(batch.inputs), batch.mask) for batch in made]
        self.structure = find_structure(self.model, self._placed(0), stack=stack, blocks=blocks, several=True)

    def step(self) -> dict[str, float] | None:
        """Count a step of training; what `measure` returns when it is one of `every`, else None."""
        self.steps += 1
        return None if self.steps % self.every else self.measure()

    def measure(self) -> dict[str, float]:
        """Measure now. Returns plain floats, ready for any tracker:

        `residual_bulk_first`, `residual_bulk_last`: at layer 0 and the last layer L; `residual_bulk_min`: the lowest
        after a block; so for each metric (`_max` where high means collapse)
        `collapse_layer`: the first layer whose bulk is at its rounding floor or below a tenth of what entered
        block 1; L + 1 where none is, NaN where the stream is not finite
        """
        refuse_mps(self.model)  # it may have moved since
        with same_random(), measuring(self.model), full_precision(self.model):
            noise = noise_on(self.structure, self._placed(0))
        attached = Attached(self.structure, self.metrics, None, stop=True, noise=noise)
        with same_random(), measuring(self.model), full_precision(self.model), attached:
            for number in range(len(self.batches)):
                inputs = with_no_cache(self.model, self._placed(number))
                attached.given = self.batches[number][1]
                run_stopped(lambda inputs=inputs: self.model(**inputs))  # type: ignore[misc]
        rows = attached.curves.rows(step=self.steps)
        if not rows:
            raise RcProbeError(
                "its blocks did not run", where=type(self.model).__name__,
                todo="Make a new Monitor after changing the model's modules",
            )  # fmt: skip
        self._rows += rows
        return summarise(rows)

    def frame(self) -> pd.DataFrame:
        """All measurements so far: columns step, layer, metric, mean, std (ddof 1, over samples), count, floor."""
        return FRAMES["monitor"].frame(self._rows)

    def _placed(self, number: int) -> dict[str, Any]:
        device = input_device(self.model) if hasattr(self.model, "device") else _device(self.model)
        inputs = self.batches[number][0]
        return {key: v.to(device) if isinstance(v, Tensor) else v for key, v in inputs.items()}


def summarise(rows: Iterable[Row]) -> dict[str, float]:
    """The few numbers of one measurement that a tracker is told; see `Monitor.measure`."""
    curves: dict[str, list[tuple[float, float]]] = {}  # of each metric, by layer: value and floor
    for row in rows:  # by layer within a metric
        curves.setdefault(row["metric"], []).append((row["mean"], row["floor"]))
    told: dict[str, float] = {}
    for name, curve in curves.items():
        values = [value for value, _ in curve]
        told[f"{name}_first"], told[f"{name}_last"] = values[0], values[-1]
        better = METRICS[name].better
        if better is not None:
            worst = "min" if better == "higher" else "max"
            told[f"{name}_{worst}"] = float(getattr(np, worst)(values[1:]))  # NaN comes through
    told["collapse_layer"] = collapse_layer(curves[BULK])
    return told


def collapse_layer(curve: Sequence[tuple[float, float]]) -> float:
    """The first layer whose residual is at its floor or below a tenth of layer 0's, of (residual, floor) by layer.

    One more than the last layer where none is, so that larger is better; NaN where a residual is.
    """
    entered = curve[0][0]
    if not all(np.isfinite(value) for value, _ in curve):
        return float("nan")
    low = (layer for layer, (value, floor) in enumerate(curve) if collapsed(value, floor, entered))
    return float(next(low, len(curve)))


def _whole(model: nn.Module) -> nn.Module:
    """The model inside what distributes, compiles or wraps it. Raises RcProbeError where its weights are sharded."""
    check_module(model)
    inner = unwrapped(model)
    for parameter in inner.parameters():
        kinds = {type(parameter).__name__, type(parameter.data).__name__}
        if kinds & {"DTensor", "FlatParameter"} or hasattr(parameter, "ds_id"):
            todo = "Measure saved checkpoints, or train with whole weights in each process"
            raise RcProbeError(
                "its weights are sharded over processes", where=type(inner).__name__, todo=todo
            )
    return inner


def _peek(data: Any) -> tuple[Any, Any]:
    """`data` with nothing lost, and its first item: None where it is no iterable of items."""
    if data is None or isinstance(data, str | Mapping) or not isinstance(data, Iterable):
        return data, None
    iterator = iter(data)
    first = next(iterator, None)
    return (chain([first], iterator) if iterator is data else data), first


def _is_batch(item: Any) -> bool:
    return isinstance(item, Mapping) and any(
        isinstance(value, Tensor) and value.ndim for value in item.values()
    )


def _first_rows(data: Iterable[Mapping[str, Any]], samples: int, model: Any) -> Iterator[dict[str, Any]]:
    """Batches until there are `samples` rows. Labels go, but where an encoder-decoder shifts them to its inputs."""
    shifts = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    for batch in data:
        size = next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim)
        kept = {
            k: v for k, v in batch.items() if k not in LABELS or (shifts and "decoder_input_ids" not in batch)
        }
        rows = {k: isinstance(v, Tensor) and v.ndim and len(v) == size for k, v in kept.items()}
        yield {k: v[:samples] if rows[k] else v for k, v in kept.items()}
        samples -= size
        if samples <= 0:
            return


def _mask_of(model: Any, batch: dict[str, Any]) -> str | None:
    """How `Attached` finds the mask: batches of a module of the user's own have none but by its usual name."""
    known = hasattr(model, "main_input_name") or {"input_ids", "attention_mask"} & batch.keys()
    return "auto" if known else None


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def same_random() -> Iterator[None]:
    """Random numbers of torch, numpy and Python go on afterwards as if nothing had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()

    def back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)

    with undoing(back), torch.random.fork_rng(devices=devices):
        yield
