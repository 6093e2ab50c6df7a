"""MiniLM with other masks, norms and temperatures, against its forward pass written by hand: state dict in, curves out."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rc_probe.data.batches import batches
from rc_probe.data.samples import load_samples
from rc_probe.hooks.attach import find_structure
from rc_probe.interventions.grammar import parse_intervention
from rc_probe.interventions.intervention import Variant
from rc_probe.measures.variant_passes import measure_variants
from rc_probe.models.load import Loaded

HEADS, LAYERS, TOKENS, EPS = 12, 6, 32, 1e-12
SEES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # query i, key j
    "complete": lambda i, j: j >= 0,
    "causal": lambda i, j: j <= i,
    "window:8": lambda i, j: (i - j).abs() <= 8,
    "window:1": lambda i, j: (i - j).abs() <= 1,
    "left:8": lambda i, j: (j <= i) & (i - j <= 8),
    "left:1": lambda i, j: (j <= i) & (i - j <= 1),
}
ALONE, BARE = "attention.skip@all+mlp.sublayer@all", "norm@all=identity"
NETS = {"SAN − norm": f"{ALONE}+{BARE}", "SAN": ALONE, "full": "", "full − norm": BARE}
TEMPERATURES = [("SAN", mask, t) for mask in ("complete", "causal") for t in (4.0, 0.25)]
CELLS = [(net, mask, 1.0) for net in NETS for mask in SEES] + TEMPERATURES
Cell = tuple[str, str, float]


def spec(net: str, mask: str, temperature: float) -> str:
    parts = [NETS[net], f"mask@all={mask}"] + ([f"temperature@all={temperature}"] if temperature != 1 else [])
    return "+".join(part for part in parts if part)


def forward(weights: dict[str, Tensor], ids: Tensor, cell: Cell) -> list[Tensor]:
    """The stream (tokens, dim) of one text at layers 0 to 6, in float64."""
    net, mask, temperature = cell
    alone, bare = net.startswith("SAN"), net.endswith("− norm")

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
        return centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    T = len(ids)
    at = torch.arange(T)
    seen = SEES[mask](at[:, None], at[None])
    table = "embeddings.{}_embeddings.weight"
    x = weights[table.format("word")][ids] + weights[table.format("position")][:T]
    x = norm(x + weights[table.format("token_type")][0], "embeddings.LayerNorm")
    streams = [x]
    for layer in range(LAYERS):
        own = f"encoder.layer.{layer}."
        q, k, v = (
            linear(x, f"{own}attention.self.{name}").reshape(T, HEADS, -1).transpose(0, 1)
            for name in ("query", "key", "value")
        )
        scores = q @ k.mT / math.sqrt(q.shape[-1]) / temperature
        mixed = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
        y = linear(mixed.transpose(0, 1).reshape(T, -1), f"{own}attention.output.dense")
        x = y if alone else x + y
        x = x if bare else norm(x, f"{own}attention.output.LayerNorm")
        if not alone:
            x = x + linear(functional.gelu(linear(x, f"{own}intermediate.dense")), f"{own}output.dense")
            x = x if bare else norm(x, f"{own}output.LayerNorm")
        streams.append(x)
    return streams


def measured(X: Tensor) -> tuple[float, float, float]:
    """‖res X‖_F / ‖X‖_F, ‖res X‖_F and the effective rank."""
    R = X - X.mean(0)
    s = np.linalg.svd(X.numpy(), compute_uv=False)
    p = s[s > 0] / s.sum()
    return float(R.norm() / X.norm()), float(R.norm()), float(np.exp(-(p * np.log(p)).sum()))


@pytest.fixture(scope="module")
def curves(demo: Loaded) -> tuple[dict[tuple[Cell, int], np.ndarray], dict[tuple[Cell, int], np.ndarray]]:
    """By hand, and by the engine: relative and absolute residual and effective rank, means over two bundled texts."""
    samples = load_samples(None, modality="text", samples=2)
    made = batches(samples, demo, length=TOKENS)
    structure = find_structure(demo.model, next(iter(made)).inputs)
    variants = [Variant(spec(*cell), parse_intervention(spec(*cell)).interventions) for cell in CELLS]
    metrics = ["residual_frobenius", "residual_frobenius_absolute", "effective_rank"]
    found, notes = measure_variants(structure, made, variants, metrics)
    assert notes == []
    ours = {
        (cell, layer): np.array([float(found[spec(*cell)].values[layer, name].mean) for name in metrics])
        for cell in CELLS
        for layer in range(LAYERS + 1)
    }
    weights = {name: value.double() for name, value in demo.model.state_dict().items()}
    (batch,) = list(made)
    mask = batch.inputs["attention_mask"].bool()
    texts = [ids[real] for ids, real in zip(batch.inputs["input_ids"], mask, strict=True)]
    hand = {}
    for cell in CELLS:
        streams = [forward(weights, ids, cell) for ids in texts]
        for layer in range(LAYERS + 1):
            hand[cell, layer] = np.mean([measured(each[layer]) for each in streams], axis=0)
    return hand, ours


Both = tuple[dict[tuple[Cell, int], np.ndarray], dict[tuple[Cell, int], np.ndarray]]


def test_every_mask_network_and_temperature_is_that_by_hand(curves: Both) -> None:
    hand, ours = curves
    for key, wanted in hand.items():
        assert ours[key][0] == pytest.approx(wanted[0], abs=1e-4), key
        assert ours[key][1] == pytest.approx(wanted[1], rel=1e-4, abs=1e-4), key
        if wanted[0] > 1e-4:  # below, the rank is that of rounding
            assert ours[key][2] == pytest.approx(wanted[2], rel=1e-3), key


def test_the_shape_is_the_known_one(curves: Both) -> None:
    """Complete masks collapse to rounding, wider ones before narrower ones, hot patterns before cold ones."""
    hand, ours = curves
    for found, rounding in ((hand, 1e-14), (ours, 1e-6)):
        last = {cell: found[cell, LAYERS][0] for cell in CELLS}
        for net in ("SAN − norm", "SAN"):
            assert last[net, "complete", 1.0] < rounding
            order = [
                last[net, mask, 1.0] for mask in ("complete", "causal", "window:8", "window:1", "left:1")
            ]
            assert order == sorted(order) and order[2] > 0.2
        for mask in ("complete", "causal"):
            early = [found[("SAN", mask, t), 3][0] for t in (4.0, 1.0, 0.25)]
            assert early == sorted(early) and early[0] < 0.8 * early[2]
        _, absolute, rank = found[("full − norm", "complete", 1.0), LAYERS]
        assert 3e3 < absolute < 3e4 and rank < 8 < found[("full", "complete", 1.0), LAYERS][2]
        assert last["full − norm", "complete", 1.0] < 0.5 < last["full", "complete", 1.0]
