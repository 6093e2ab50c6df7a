"""Live paths: the paper's own evaluation of sampled paths (Dong et al. 2021, section 3.2 and its official code).

Unlike the terms of the frozen decomposition, a live path is a network run by itself: attention is recomputed on
the path's own states. The states that the paths of one draw end in are summed, and normed without gain and bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.edits.single_precision import single_precision
from rc_probe.hooks.edits.stream_taps import Tap, run_stopped
from rc_probe.hooks.frozen.frozen_pass import Step
from rc_probe.hooks.frozen.live_pass import EPS, Live
from rc_probe.hooks.structure.example_inputs import batch_size, with_no_cache
from rc_probe.hooks.structure.structure import Structure

from .decompose import hops
from .path_proofs import prove_steps
from .sample import check_paths, stream_size


def draw_paths(choices: list[Step], length: int, paths: int, generator: torch.Generator) -> Tensor:
    """Paths of one length, uniform and with replacement: which steps, then a head in each. (paths, steps)."""
    order = torch.rand(paths, len(choices), generator=generator).argsort(1)
    taken = order < length  # `length` of the steps, each subset as likely
    heads = torch.stack([torch.randint(s.heads, (paths,), generator=generator) + 1 for s in choices], 1)
    return heads * taken


def live(
    model: nn.Module | Structure,
    batch: dict[str, Any],
    paths: Tensor,
    *,
    count_mlp: bool = False,
    stack: str | None = None,
    blocks: str | None = None,
) -> Tensor:
    """The states in which given paths end, (paths, batch, tokens, dim): the stream after the last block.

    paths: (paths, steps), 0 for the skip and h for head h (from 1). Raises RcProbeError for a model that
    does not let its rows go along paths of their own.
    """
    structure = (
        model if isinstance(model, Structure) else find_structure(model, batch, stack=stack, blocks=blocks)
    )
    choices = hops(structure, count_mlp=count_mlp)
    check_paths(structure, choices, paths)
    prove_steps(structure, batch, choices)
    rows = batch_size(batch)
    states = [
        _run(structure, choices, batch, rows, chunk) for chunk in paths.split(_at_once(structure, batch))
    ]
    return torch.cat(states)


def summed(states: Tensor) -> Tensor:
    """States of paths (…, paths, batch, tokens, dim) as one stream: their sum, normed without gain and bias."""
    total = states.sum(-4)
    return functional.layer_norm(total, total.shape[-1:], eps=EPS)


def _run(
    structure: Structure, choices: list[Step], batch: dict[str, Any], rows: int, paths: Tensor
) -> Tensor:
    found: list[Tensor] = []

    def keep(layer: int, x: Tensor) -> None:
        if layer == structure.depth:
            found.append(x.clone())

    inputs = {key: _repeated(value, rows, len(paths)) for key, value in batch.items()}
    each = paths.repeat_interleave(rows, 0)  # one path for all rows of the batch, then the next
    model = structure.model
    with (
        measuring(model),
        single_precision(model),
        Tap(structure, keep, stop=True),
        Live(structure, choices, each),
    ):
        run_stopped(lambda: model(**with_no_cache(model, inputs)))
    states: Tensor = found[0].unflatten(0, (len(paths), rows))
    return states


def _repeated(value: Any, rows: int, times: int) -> Any:
    whole = isinstance(value, Tensor) and value.ndim and len(value) == rows
    return value.repeat(times, *[1] * (value.ndim - 1)) if whole else value


def _at_once(structure: Structure, batch: dict[str, Any]) -> int:
    """How many paths go through the model together, so that they take about a gigabyte."""
    return max(1, 2**30 // (stream_size(structure, batch) * 4 * 16))
