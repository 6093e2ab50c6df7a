"""Texts measured one by one, in numpy."""

from typing import Any

import numpy as np
import torch
from support import tiny

TEXTS = [tiny.words(4), tiny.words(9, 3), tiny.words(6, 5), tiny.words(2, 7), tiny.words(7, 11)]


def numpy_residual(x: np.ndarray) -> float:
    """‖res X‖₁,∞ / ‖X‖₁,∞ of one stream (tokens, dim), as the paper writes it."""
    x = x.astype(np.float64)
    rest = x - x.mean(0)
    sizes = [np.abs(m).sum(0).max() * np.abs(m).sum(1).max() for m in (rest, x)]
    return float(np.sqrt(sizes[0] / sizes[1]))


def alone(model: Any, samples: list[dict[str, torch.Tensor]], layers: int) -> list[float]:
    """The mean residual of layers 0 … of samples run one by one, from the model's own hidden states."""
    with torch.no_grad():
        runs = [model(**sample, output_hidden_states=True).hidden_states for sample in samples]
    return [float(np.mean([numpy_residual(run[i][0].numpy()) for run in runs])) for i in range(layers)]


def tokenized(tokenizer: Any, texts: list[str] = TEXTS) -> list[dict[str, torch.Tensor]]:
    return [dict(tokenizer(text, return_tensors="pt")) for text in texts]


REAL = ["A short text.", "A longer one, of more words than the first.", "The third."]
