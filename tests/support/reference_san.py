"""The paths of the paper's code, by hand on the weights of a SAN: one path at a time, in plain torch.

Unlike the terms of the theorem these paths are small networks of their own: attention is computed anew from the
path's own states, without the skip, with a LayerNorm that has neither gain nor bias, and with the whole output
bias at each hop. Source: Dong et al. 2021, section 4.2, as its code has it with `--no_sub_path`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from rc_probe.models.own.san import SANAttention, SANForTokenClassification


def draw_paths(depth: int, heads: int, length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` random paths (count, depth) through `length` layers: a head from 0 each, `heads` means skipped."""
    paths = rng.integers(heads, size=(count, depth))
    for path in paths:
        path[rng.choice(depth, depth - length, replace=False)] = heads
    return paths


def embedded(model: SANForTokenClassification, ids: Tensor) -> Tensor:
    """What enters the first block (B, T, d)."""
    san = model.san
    x = san.words.weight[ids]
    if san.positions is not None:
        x = x + san.positions.weight[: ids.shape[1]]
    x = x @ san.project.weight.T + san.project.bias
    return plain_norm(x, san.norm.eps) * san.norm.weight + san.norm.bias


def head(attention: SANAttention, x: Tensor, index: int) -> Tensor:
    """What one head adds (B, T, d): P (x V + b_V) O, without the output bias."""
    d = x.shape[-1] // attention.heads
    own = slice(index * d, (index + 1) * d)
    q, k, v = (
        x @ part.weight[own].T + part.bias[own] for part in (attention.query, attention.key, attention.value)
    )
    pattern = (q @ k.mT / math.sqrt(d)).softmax(-1)
    return pattern @ v @ attention.output.weight[:, own].T


def plain_norm(x: Tensor, eps: float) -> Tensor:
    """LayerNorm without gain and bias."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def walk(model: SANForTokenClassification, ids: Tensor, path: Sequence[int]) -> Tensor:
    """The last state of one path (B, T, d)."""
    h = embedded(model, ids)
    for block, index in zip(model.san.blocks, path, strict=True):
        if index != model.config.num_attention_heads:
            h = head(block.attention, h, index) + block.attention.output.bias
            h = plain_norm(h, block.attention_norm.eps)
    return h


def together(model: SANForTokenClassification, ids: Tensor, paths: Iterable[Sequence[int]]) -> Tensor:
    """The logits (B, T, labels) of several paths: states summed, one plain norm, the classifier."""
    total = torch.stack([walk(model, ids, path) for path in paths]).sum(0)
    eps = model.san.blocks[-1].attention_norm.eps
    return plain_norm(total, eps) @ model.classifier.weight.T + model.classifier.bias


def entire(model: SANForTokenClassification, ids: Tensor) -> Tensor:
    """The logits of the whole model (B, T, labels): all heads, skips and trained norms."""
    h = embedded(model, ids)
    for block in model.san.blocks:
        heads = sum(head(block.attention, h, i) for i in range(block.attention.heads))
        norm = block.attention_norm
        h = plain_norm(heads + block.attention.output.bias + h, norm.eps) * norm.weight + norm.bias
    return h @ model.classifier.weight.T + model.classifier.bias
