"""What is left of a model, for use elsewhere: lists of indices, code for transformers, mergekit's YAML, llama.cpp's list.

A form is given only where the smaller model was built from the model at hand and gave what the gated one gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import nn

from rc_probe.hooks.edits.edits import Editing
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.errors import reason
from rc_probe.hooks.structure.example_inputs import with_no_cache
from rc_probe.hooks.structure.structure import Structure
from rc_probe.hooks.undo import undoing
from rc_probe.interventions.gate import Gated
from rc_probe.interventions.intervention import Variant, span
from rc_probe.measures.importance.scored import Plan, prepared_batches

if TYPE_CHECKING:
    from rc_probe.measures.context import Context

CLOSE = 1e-5  # of the largest number in the output
CODE = """\
import torch
import transformers

model = transformers.{cls}.from_pretrained({id!r})
blocks = model.get_submodule({stack!r})
kept = [i for i in range(len(blocks)) if i not in {gone}]  # from 0
owner = model.get_submodule({owner!r})
owner.{name} = torch.nn.ModuleList(blocks[i] for i in kept)
for new, block in enumerate(owner.{name}):
    for module in block.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = new
config = model.config.get_text_config()
for key, value in list(vars(config).items()):
    if isinstance(value, list) and len(value) == len(blocks):  # one entry for each block
        setattr(config, key, [value[i] for i in kept])
config.num_hidden_layers = len(kept)
# model.save_pretrained("smaller")
"""


class _RefusedError(Exception):
    """Why there is no smaller model."""


def emit(context: Context, plan: Plan, parts: Sequence[Gated]) -> dict[str, Any]:
    """For the facts: `ablate`, the spec; numbers of blocks by component, `from_1` and `from_0`; `forms` by name, or
    `refused`, the reason why there are none."""
    places: dict[str, list[int]] = {}
    for part in parts:
        places.setdefault(part.part, []).extend(part.blocks or ())
    found: dict[str, Any] = {
        "ablate": "+".join(f"{name}@{span(tuple(numbers))}" for name, numbers in places.items()),
        "from_1": {name: sorted(numbers) for name, numbers in places.items()},
        "from_0": {name: sorted(number - 1 for number in numbers) for name, numbers in places.items()},
    }  # fmt: skip
    try:
        if any(part.part != "block" for part in parts):
            raise _RefusedError("these forms drop whole blocks, not branches alone")
        stack = _stack(context.structure)
        gone = found["from_0"]["block"]
        kept = [i for i in range(context.structure.depth) if i not in gone]
        _check(context, plan, parts, stack, kept)
    except _RefusedError as why:
        return found | {"refused": str(why)}
    forms = {"transformers": _code(context, stack, gone), "mergekit": _mergekit(context, kept)}
    if plan.task is not None and plan.task.name == "next token":
        layers = ",".join(map(str, gone))
        forms["llama.cpp"] = f"llama-quantize --prune-layers {layers} MODEL.gguf SMALLER.gguf TYPE"
    return found | {"forms": forms}


def _stack(structure: Structure) -> str:
    """The name of the list that holds the blocks, each of them once and nothing else."""
    first = structure.blocks[0]
    if any(block.turns > 1 for block in structure.blocks):
        raise _RefusedError(
            f"its blocks share their weights: one module ({first.name}) is called {first.turns} times, and no call can be "
            "left out of a checkpoint"
        )
    stack = first.name.rpartition(".")[0]
    if getattr(structure.model.config, "is_encoder_decoder", False):
        raise _RefusedError(
            "of an encoder-decoder model two stacks would have to be told apart in its config"
        )
    blocks = structure.model.get_submodule(stack)
    if not isinstance(blocks, nn.ModuleList) or [b.name for b in structure.blocks] != [
        f"{stack}.{i}" for i in range(len(blocks))
    ]:
        raise _RefusedError(f"its blocks are not all of one list of modules ({stack})")
    return stack


@contextmanager
def smaller(model: Any, stack: str, kept: Sequence[int]) -> Iterator[None]:
    """The model with these blocks alone, numbered anew, its config to match; as before when the context closes."""
    where, _, name = stack.rpartition(".")
    owner, blocks, config = (
        model.get_submodule(where),
        model.get_submodule(stack),
        model.config.get_text_config(),
    )
    settings = {
        key: value
        for key, value in vars(config).items()
        if isinstance(value, list) and len(value) == len(blocks)
    }
    depth = config.num_hidden_layers
    numbers = [
        (module, module.layer_idx)
        for block in blocks
        for module in block.modules()
        if hasattr(module, "layer_idx")
    ]

    def back() -> None:
        setattr(owner, name, blocks)
        for module, number in numbers:
            module.layer_idx = number
        for key, value in settings.items():
            setattr(config, key, value)
        config.num_hidden_layers = depth

    with undoing(back):
        setattr(owner, name, nn.ModuleList(blocks[i] for i in kept))
        for new, i in enumerate(kept):
            for module in blocks[i].modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = new
        for key, value in settings.items():
            setattr(config, key, [value[i] for i in kept])
        config.num_hidden_layers = len(kept)
        yield


def _check(context: Context, plan: Plan, parts: Sequence[Gated], stack: str, kept: Sequence[int]) -> None:
    """On the first batch the smaller model says what the gated one says."""
    structure, task = context.structure, plan.task
    assert task is not None
    batch = next(prepared_batches(task, plan.batches(context.loaded, context.settings)))
    inputs = with_no_cache(structure.model, batch.inputs)
    edits = Variant("gone", tuple(parts)).edits(structure)
    with measuring(structure.model):
        with Editing(structure, edits):
            gated = task.head(task.model(**inputs))
        try:
            with smaller(structure.model, stack, kept):
                built = task.head(task.model(**inputs))
        except Exception as error:  # the model's own: a block may hold what the others need
            raise _RefusedError(f"the smaller model does not run ({reason(error)})") from error
    difference = (
        float((built - gated).abs().max() / gated.abs().max().clamp_min(1e-30))
        if built.shape == gated.shape
        else 1.0
    )
    if not difference <= CLOSE:
        raise _RefusedError(
            f"the smaller model gives other numbers than the gated one (by {difference:.1g} of the largest)"
        )


def _source(context: Context) -> str:
    """Where the model was loaded from, as `from_pretrained` takes it; of one made in memory its class."""
    return str(getattr(context.loaded.model.config, "_name_or_path", "") or context.loaded.id)


def _code(context: Context, stack: str, gone: Sequence[int]) -> str:
    owner, _, name = stack.rpartition(".")
    model = context.loaded.model
    import transformers

    cls = type(model).__name__
    cls = cls if hasattr(transformers, cls) else "AutoModel"
    return CODE.format(cls=cls, id=_source(context), stack=stack, owner=owner, name=name, gone=list(gone))


def _mergekit(context: Context, kept: Sequence[int]) -> str:
    lines = ["slices:"]
    for _, run in groupby(enumerate(kept), key=lambda pair: pair[1] - pair[0]):
        numbers = [i for _, i in run]
        lines += [
            "  - sources:",
            f"      - model: {_source(context)}",
            f"        layer_range: [{numbers[0]}, {numbers[-1] + 1}]",
        ]
    dtype = str(context.loaded.model.dtype).removeprefix("torch.")
    return "\n".join([*lines, "merge_method: passthrough", f"dtype: {dtype}"]) + "\n"
