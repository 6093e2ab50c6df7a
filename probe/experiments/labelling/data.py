"""Sequences with a label for each token, and how good guesses are on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NONE = -100  # the label of padding, as torch's cross-entropy has it


class Labelled(NamedTuple):
    """Sequences. inputs: of the model's forward pass, (sequences, tokens, …) each; labels (sequences, tokens), NONE at padding."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def rows(self, which: Tensor | slice) -> Labelled:
        return Labelled({name: value[which] for name, value in self.inputs.items()}, self.labels[which])


def accuracy(guesses: Tensor, labels: Tensor) -> float:
    """Share of labels that are guessed, the mean over sequences: each weighs alike, as in all scores of tasks.

    guesses (sequences, tokens), or logits (sequences, tokens, classes); labels (sequences, tokens), NONE left out
    """
    chosen = guesses.argmax(-1) if guesses.ndim > labels.ndim else guesses
    real = labels != NONE
    shares = ((chosen == labels) & real).sum(-1) / real.sum(-1).double()
    return float(shares.mean())


def commonest(keys: Tensor, labels: Tensor, count: int, classes: int) -> Tensor:
    """The commonest label of each key, (count,): the best guess for who knows the key alone.

    keys (…), from 0 to count − 1, and labels (…) of the same shape; labels of NONE are left out
    """
    real = labels != NONE
    seen = torch.bincount(keys[real] * classes + labels[real], minlength=count * classes)
    return seen.view(count, classes).argmax(1)


def disjoint(found: Tensor, others: Tensor) -> Tensor:
    """(sequences,): whether a row of `found` (sequences, …) is none of `others`."""
    rows, known = (x.flatten(1) for x in (found, others))
    _, place = torch.cat([known, rows]).unique(dim=0, return_inverse=True)
    return ~torch.isin(place[len(known) :], place[: len(known)])
