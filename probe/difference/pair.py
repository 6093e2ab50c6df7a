"""Two models on the same samples: loaded, given the same inputs, their layers matched, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rc_probe.api import dtype_and_device, load_named
from rc_probe.data.batches import Batch, Batches, batches
from rc_probe.data.samples import Samples
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.pairs.given import built_alike
from rc_probe.hooks.structure.structure import Structure
from rc_probe.models.libraries import first_line, quiet
from rc_probe.models.load import Loaded, hold_model
from rc_probe.models.packaged import shown_id
from rc_probe.models.structure_table import model_entry
from rc_probe.processes.world import World
from rc_probe.results.like_for_like import aligned
from rc_probe.results.words import THINGS

from .options import QUANTISED, DiffOptions, option_of


@dataclass(frozen=True)
class Side:
    """One of the two. entry: what is known of it, for the results."""

    loaded: Loaded
    made: Batches
    structure: Structure
    entry: dict[str, Any]

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def name(self) -> str:
        return str(self.entry["name"])


@dataclass(frozen=True)
class _Known:
    """What `aligned` reads of a result."""

    model: dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Both, and how their layers stand to each other. A is what B is compared with."""

    a: Side
    b: Side
    samples: Samples
    notes: list[str] = field(default_factory=list)

    @property
    def same_depth(self) -> bool:
        return self.a.structure.depth == self.b.structure.depth

    @property
    def same_width(self) -> bool:
        return self.a.structure.dim == self.b.structure.dim

    @property
    def built_alike(self) -> bool:
        """Whether B's blocks can be given what A's got, branch by branch."""
        return self.same_depth and self.same_width and built_alike(self.a.structure, self.b.structure)

    @cached_property
    def matched(self) -> dict[int, int] | None:
        """By layer of A that of B which corresponds: in turn, or where B is A without some blocks (or A is B) by their weights.

        None where that is not known.
        """
        pairs = aligned(_Known(self.a.entry), _Known(self.b.entry))
        return None if pairs is None else dict(pairs)

    @property
    def partners(self) -> dict[int, int]:
        """By layer of A the layer of B beside it: the one that corresponds, else the one of the same relative depth."""
        a, b = self.a.structure.depth, self.b.structure.depth
        return self.matched or {layer: round(layer * b / a) for layer in range(a + 1)}

    def batches(self, made_a: Iterable[Batch], made_b: Iterable[Batch]) -> Iterator[tuple[Batch, Batch]]:
        """Both models' inputs, batch by batch. RcProbeError where they are not the same."""
        for one, other in zip(made_a, made_b, strict=True):
            refuse_other_inputs(one, other, self)
            yield one, other


def load_pair(
    a: Any, b: Any, chosen: DiffOptions, processor: Any, processor_b: Any, world: World
) -> tuple[Loaded, Loaded]:
    """Both models. Names are loaded by the options; models that the user holds are left as they are."""
    first = _loaded(a, chosen, processor, world)
    own = chosen.of_b
    attention, quantised = own.pop("attention", None), own.pop("quantise", None)
    if processor_b is None and not isinstance(b, str) and not getattr(b, "name_or_path", ""):
        processor_b = first.processor  # one that was loaded from somewhere has its own there
    second = _loaded(b, replace(chosen, **own), processor_b, world)
    if attention:
        _set_attention(second, attention)
    if quantised:
        _quantise(second, quantised)
    if first.modality != second.modality:
        what = f"the first model takes {THINGS[first.modality]} and the second {THINGS[second.modality]}"
        raise RcProbeError(what, where="diff", todo="Give two models of the same kind of data")
    return first, second


def _loaded(model: Any, chosen: DiffOptions, processor: Any, world: World) -> Loaded:
    if isinstance(model, str):
        return load_named(model, chosen, world)
    return hold_model(model, processor, stack=chosen.stack, blocks=chosen.blocks)


def _set_attention(loaded: Loaded, name: str) -> None:
    try:
        loaded.model.set_attn_implementation(name)
    except Exception as error:  # the library's own, of any kind
        what = f"{type(loaded.model).__name__} has no attention implementation {name!r} ({first_line(error)})"
        raise RcProbeError(what, where=option_of("attention_b"), todo="Try eager or sdpa") from error


def _quantise(loaded: Loaded, name: str) -> None:
    where = option_of("quantise_b")
    try:
        with quiet():
            from torchao import quantization
    except ImportError as error:
        raise RcProbeError("it needs torchao", where=where, todo="pip install torchao") from error
    try:
        with quiet():
            quantization.quantize_(loaded.model, getattr(quantization, QUANTISED[name])())
    except Exception as error:  # of kernels that a device or a dtype lacks
        what = f"torchao cannot quantise {type(loaded.model).__name__} ({first_line(error)})"
        raise RcProbeError(
            what, where=where, todo="Try the other of its values, or --dtype float32"
        ) from error


def pair_of(loaded: tuple[Loaded, Loaded], samples: Samples, chosen: DiffOptions) -> Pair:
    """The two on these samples, attached. RcProbeError where they do not get the same inputs, or one cannot be proved."""
    made = two_batches(loaded, samples, chosen)
    examples = [next(iter(each)).inputs for each in made]
    structures = [
        find_structure(one.model, inputs, stack=one.stack or chosen.stack, blocks=chosen.blocks)
        for one, inputs in zip(loaded, examples, strict=True)
    ]
    names = _names(loaded, chosen)
    sides = [
        Side(one, batch, structure, {"name": name, **_entry(one, structure)})
        for one, batch, structure, name in zip(loaded, made, structures, names, strict=True)
    ]
    return Pair(sides[0], sides[1], samples, [made[0].note] if made[0].note else [])


def two_batches(
    loaded: tuple[Loaded, Loaded], samples: Samples, chosen: DiffOptions
) -> tuple[Batches, Batches]:
    """The same samples as the inputs of both, cut to what both have positions for."""

    def make(one: Loaded, length: int) -> Batches:
        return batches(
            samples, one, length=length, batch_size=chosen.batch_size, special_tokens=chosen.special_tokens
        )

    made = [make(one, chosen.length) for one in loaded]
    lengths = {each.length for each in made if each.length is not None}
    if len(lengths) > 1:
        made = [make(one, min(lengths)) for one in loaded]
    if samples.kind == "text":
        _refuse_other_tokens(*made)
    if [len(part) for part in made[0].slices] != [len(part) for part in made[1].slices]:
        raise RcProbeError("they batch the samples differently", where="diff", todo="Use --batch-size 1")
    return made[0], made[1]


def _refuse_other_tokens(a: Batches, b: Batches) -> None:
    for number, (mine, its) in enumerate(zip(a.items, b.items, strict=True)):
        if mine["input_ids"] != its["input_ids"]:
            what = f"the tokenizers of the two make other tokens of text {number}, and tokens are what is compared"
            todo = "Give two models with the same tokenizer; `rc-probe compare` puts others side by side"
            raise RcProbeError(what, where="diff", todo=todo)


def refuse_other_inputs(one: Batch, other: Batch, pair: Pair) -> None:
    """RcProbeError where the models get other pixels, samples of sound or tokens of a decoder."""
    for name in one.inputs.keys() & other.inputs.keys():
        if not _same(one.inputs[name], other.inputs[name]):
            what = f"{pair.a.name} and {pair.b.name} are given other {name} for the same samples"
            todo = "Give two models with the same preprocessing; `rc-probe compare` puts others side by side"
            raise RcProbeError(what, where="diff", todo=todo)


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether two inputs are the same, as far as the coarser dtype tells."""
    if x.shape != y.shape:
        return False
    if x.is_floating_point() and y.is_floating_point():
        coarse = max((x.dtype, y.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        x, y = x.to(coarse), y.to(coarse)
    return torch.equal(x.cpu(), y.cpu())


def _entry(loaded: Loaded, structure: Structure) -> dict[str, Any]:
    model = loaded.model
    entry = model_entry(loaded, model, structure, shown_id(loaded.id))
    return {**entry, **dtype_and_device(model), "notes": list(loaded.notes)}


def _names(loaded: tuple[Loaded, Loaded], chosen: DiffOptions) -> tuple[str, str]:
    """For reading: the last part of the ids; where that is the same, with what tells the second apart."""
    a, b = (
        shown_id(one.id).rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] or type(one.model).__name__
        for one in loaded
    )
    if a != b:
        return a, b
    own = [str(value) for value in chosen.of_b.values()]
    return f"{a} (A)" if not own else a, f"{b} ({', '.join(own)})" if own else f"{b} (B)"
