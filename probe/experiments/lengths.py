"""What paths of each length do for the sorting network: exact, sampled, and as the paper's code runs them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.model_head import ModelHead
from rc_probe.paths import decompose, live, sample
from rc_probe.paths.decompose import hops
from rc_probe.paths.live import draw_paths, summed

from .san import SANForTokenClassification

PATHS, REPEATS = 20, 5


class Trained(NamedTuple):
    """The model, in eval mode, with the test sequences that it never saw, (sequences, tokens) each."""

    model: SANForTokenClassification
    inputs: Tensor
    labels: Tensor


class Accuracy(NamedTuple):
    """A line of the table: token accuracy on the test sequences; std over repeats where there are some."""

    name: str
    value: float
    std: float | None = None


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of tokens whose largest logit is the label's. logits (..., tokens, labels), labels (..., tokens)."""
    return float((logits.argmax(-1) == labels).double().mean())


def by_length(trained: Trained) -> list[Accuracy]:
    """Token accuracy of each length alone and of all up to it; of `PATHS` paths drawn `REPEATS` times."""
    inputs = {"input_ids": trained.inputs}
    structure = find_structure(trained.model, inputs)
    exact = decompose(structure, inputs)
    drawn = sample(structure, inputs, paths=PATHS, repeats=REPEATS)
    choices, generator = hops(structure), torch.Generator().manual_seed(0)
    ends = [
        [summed(live(structure, inputs, draw_paths(choices, k, PATHS, generator))) for _ in range(REPEATS)]
        for k in range(exact.most + 1)
    ]
    up_to, lines = exact.bias, []
    with ModelHead(structure, inputs) as head:

        def score(name: str, streams: list[Tensor]) -> Accuracy:
            values = torch.tensor([accuracy(head(x).logits, trained.labels) for x in streams])
            spread = float(values.std(correction=0)) if len(values) > 1 else None
            return Accuracy(name, float(values.mean()), spread)

        for k, live_ends in enumerate(ends):
            up_to = up_to + exact.length(k)
            estimates = [exact.bias + part for part in drawn.stream[:, k]]
            lines += [
                score(f"length {k}, exact", [exact.bias + exact.length(k)]),
                score(f"length {k}, sampled", estimates),
                score(f"length {k}, live, {PATHS} paths", live_ends),
                score(f"lengths up to {k}, exact", [up_to]),
            ]
    return lines
