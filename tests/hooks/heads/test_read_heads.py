"""Heads are read off any model: their forms against dense products of the weights, taken out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import zoo
from support.head_weights import HEADS, WIDTH, by_hand, dense
from support.untouched import same, state
from torch import Tensor, nn

from rc_probe import RcProbeError
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.heads.read import heads_of, read_heads

FAMILIES = ["bert", "gpt2", "llama", "gpt_neox", "vit"]


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool(((found - wanted).abs() <= 1e-5 * wanted.abs().amax()).all())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_forms_are_those_of_the_weights(name: str) -> None:
    """Singular values, traces and norms of the dense matrices, to 1e-5; with padded batches, fused and grouped heads."""
    model, inputs = zoo.build(name, padded=True)
    found, refused = read_heads(find_structure(model, inputs))
    assert sorted(found) == [0, 1, 2] and not refused
    for block, heads in found.items():
        assert (heads.count, heads.width, heads.no_ov, heads.left_out) == (HEADS, WIDTH, "", ())
        qk, ov = dense(by_hand(name, model, block))
        assert heads.ov is not None
        for circuit, whole in ((heads.qk, qk), (heads.ov, ov)):
            assert close(torch.linalg.svdvals(circuit.core), torch.linalg.svdvals(whole)[:, :WIDTH])
            square = whole[:, : zoo.BERT["hidden_size"], : zoo.BERT["hidden_size"]]
            assert close(circuit.norms, torch.linalg.matrix_norm(square))
            assert close(
                circuit.across.diagonal(dim1=-2, dim2=-1).sum(-1), square.diagonal(dim1=-2, dim2=-1).sum(-1)
            )
            assert close(
                (circuit.across * circuit.across.mT).sum((-2, -1)), (square * square.mT).sum((-2, -1))
            )


@pytest.mark.parametrize(
    ("name", "pairs", "angles"),
    [
        ("llama", [[0, 4], [1, 5], [2, 6], [3, 7]], [1, 1e-1, 1e-2, 1e-3]),
        ("gpt_neox", [[0, 1]], [1]),  # a quarter of eight features turns
    ],
)
def test_pairs_of_rotary_features(name: str, pairs: list[list[int]], angles: list[float]) -> None:
    model, inputs = zoo.build(name)
    heads = read_heads(find_structure(model, inputs))[0][1]
    assert heads.turns and heads.rotary is not None and heads.energy is not None
    assert heads.rotary.pairs.tolist() == pairs
    assert heads.rotary.angles.tolist() == pytest.approx(angles, rel=1e-3)
    maps = by_hand(name, model, 1)
    alone = [maps["query"][:, pair].mT @ maps["key"][:, pair] for pair in pairs]
    still = [n for n in range(WIDTH) if n not in {at for pair in pairs for at in pair}]
    rest = [maps["query"][:, [n]].mT @ maps["key"][:, [n]] for n in still]
    energies = torch.stack([torch.linalg.matrix_norm(each).square() for each in (*alone, *rest)], -1)
    assert close(heads.energy, energies[:, : len(pairs)] / energies.sum(-1, keepdim=True))


def test_features_of_grouped_heads_are_found() -> None:
    model, inputs = zoo.build("llama")
    heads = read_heads(find_structure(model, inputs))[0][0]
    assert heads.query.features.tolist() == torch.arange(32).reshape(4, 8).tolist()
    assert heads.key.features.tolist() == torch.arange(16).reshape(2, 8).tolist() and heads.groups == 2


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("deberta_v2", "its softmax gets scores that are put together before"),
        (
            "qwen3",
            r"its queries go through a norm behind their projection: Qwen3RMSNorm \(self_attn.q_norm\)",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(name: str, why: str) -> None:
    model, inputs = zoo.build(name)
    structure = find_structure(model, inputs)
    found, refused = read_heads(structure)
    assert not found and len(refused) == structure.depth
    with pytest.raises(RcProbeError, match=f"block 2.*its heads cannot be read: {why}"):
        heads_of(structure, (2,))


def test_latent_attention_is_refused_and_reading_leaves_no_trace() -> None:
    import transformers
    from support.random_models import make

    config = transformers.DeepseekV3Config(
        **zoo.LLAMA | {"num_hidden_layers": 2, "first_k_dense_replace": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "num_key_value_heads": 4},
        qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=2, moe_intermediate_size=16,
    )  # fmt: skip
    model = make(transformers.DeepseekV3Model, config, torch.float32, 0)
    inputs = {"input_ids": torch.randint(10, 90, (2, 12), generator=torch.Generator().manual_seed(0))}
    structure = find_structure(model, inputs)
    before = state(model)
    found, refused = read_heads(structure)
    assert not found
    by = "linear in Linear (self_attn.kv_a_proj_with_mqa), Linear (self_attn.kv_b_proj)"
    assert refused[0] == f"its keys are not made by one linear module: by {by}"
    same(before, state(model))


class Gated(nn.Module):
    """Attention of torch, the heads times a gate before the output projection: no one map from heads to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.g = (nn.Linear(16, 16) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.o(mixed * self.g(x).sigmoid())


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Gated() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_gate_behind_the_heads_leaves_the_other_circuit() -> None:
    """A model of torch alone, its op intercepted."""
    model = Stack().eval()
    found, refused = read_heads(
        find_structure(model, {"x": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))})
    )
    assert sorted(found) == [0, 1] and not refused
    assert found[0].ov is None and "does not read what its attention returns" in found[0].no_ov
    layer: Any = model.layers[0]
    query, key = (
        torch.cat([m.weight, m.bias[:, None]], 1).double().unflatten(0, (2, 8)) for m in (layer.q, layer.k)
    )
    assert close(torch.linalg.svdvals(found[0].qk.core), torch.linalg.svdvals(query.mT @ key)[:, :8])


def test_weights_that_change_are_read_anew() -> None:
    model, inputs = zoo.build("bert")
    structure = find_structure(model, inputs)
    before = read_heads(structure)[0][0].qk.core
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight.mul_(2)
    after = read_heads(structure)[0][0].qk
    assert close(
        torch.linalg.svdvals(after.core), torch.linalg.svdvals(dense(by_hand("bert", model, 0))[0])[:, :WIDTH]
    )
    assert not torch.equal(before, after.core)
