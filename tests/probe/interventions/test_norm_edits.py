"""Norms in other forms, against norms written by hand into the modules of the zoo, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support import zoo
from support.untouched import same, state
from torch import Tensor, nn

import rc_probe
from rc_probe import RcProbeError, engine
from rc_probe.data.batches import Batch
from rc_probe.hooks.attach import find_structure
from rc_probe.interventions.grammar import parse_intervention
from rc_probe.measures.variant_passes import stream_pass

LAYER, RMS = True, False  # whether the mean is taken off
NORMS = {  # of each block, by hand off the library's modeling files
    "bert": ("encoder.layer.{}.", ("attention.output.LayerNorm", "output.LayerNorm"), LAYER),
    "albert": ("encoder.albert_layer_groups.0.albert_layers.0.", ("attention.LayerNorm", "full_layer_layer_norm"), LAYER),
    "opt_post_norm": ("decoder.layers.{}.", ("self_attn_layer_norm", "final_layer_norm"), LAYER),
    "gpt2": ("h.{}.", ("ln_1", "ln_2"), LAYER),
    "gptj": ("h.{}.", ("ln_1",), LAYER),
    "vit": ("layers.{}.", ("layernorm_before", "layernorm_after"), LAYER),
    "swin": ("encoder.layers.0.blocks.{}.", ("layernorm_before", "layernorm_after"), LAYER),
    "llama": ("layers.{}.", ("input_layernorm", "post_attention_layernorm"), RMS),
    "t5_encoder": ("encoder.block.{}.", ("layer.0.layer_norm", "layer.1.layer_norm"), RMS),
    "gemma2": ("layers.{}.", ("input_layernorm", "pre_feedforward_layernorm"), RMS),
}  # fmt: skip
WAYS = ("identity", "no-affine", "center", "scale")


def built(family: str, side: str = "right") -> tuple[Any, dict[str, Tensor]]:
    model, inputs = zoo.build(family, dtype=torch.float64, padded=family not in {"vit", "swin"})
    if side == "left":
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return model, inputs


def norms_of(model: nn.Module, family: str) -> list[tuple[nn.Module, bool]]:
    path, names, centred = NORMS[family]
    blocks = zoo.ZOO[family].blocks if "{}" in path else 1
    names = tuple(path.format(block) + name for block in range(blocks) for name in names)
    if family == "swin":  # two stages
        stacks = {name for name, _ in model.named_modules()}
        names = tuple(n for n in stacks if n.endswith(("layernorm_before", "layernorm_after")))
    return [(model.get_submodule(name), centred) for name in names]


def epsilon(norm: nn.Module) -> float:
    return next(float(getattr(norm, name)) for name in ("eps", "variance_epsilon") if hasattr(norm, name))


def scale_of(norm: nn.Module, centred: bool, x: Tensor) -> Tensor:
    variance = x.var(-1, correction=0, keepdim=True) if centred else x.pow(2).mean(-1, keepdim=True)
    return torch.sqrt(variance + epsilon(norm))


def by_hand(how: str, norm: nn.Module, centred: bool) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if how == "identity":
            return x * 1
        if how == "center":
            return x - x.mean(-1, keepdim=True)
        if how == "scale":
            return x / scale_of(norm, RMS, x)
        return (x - x.mean(-1, keepdim=True) if centred else x) / scale_of(norm, centred, x)

    return forward


def real_rows(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model(**inputs)[0]
    mask = inputs.get("attention_mask")
    return hidden if mask is None else hidden[mask.bool()]


@pytest.mark.parametrize("family", NORMS)
def test_norms_are_those_written_by_hand(family: str) -> None:
    model, inputs = built(family, "left" if family in {"bert", "llama", "gpt2"} else "right")
    before, found = state(model), {}
    for how in WAYS:
        with rc_probe.ablate(model, f"norm@all={how}", inputs=inputs):
            found[how] = real_rows(model, inputs)
    same(before, state(model))
    plain = real_rows(model, inputs)
    norms = norms_of(model, family)
    for how in WAYS:
        for norm, centred in norms:
            norm.forward = by_hand(how, norm, centred)  # type: ignore[assignment]
        wanted = real_rows(model, inputs)
        close = 1e-8 if norms[0][1] is LAYER else 1e-5  # the library's RMSNorms compute in float32
        assert torch.allclose(found[how], wanted, rtol=close, atol=close), how
        assert not torch.allclose(wanted, plain, rtol=1e-3, atol=1e-3), how
        for norm, _ in norms:
            del norm.forward


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", NORMS)
def test_a_norm_with_its_own_scale_is_the_plain_model(family: str, implementation: str) -> None:
    model, inputs = zoo.build(family, padded=family not in {"vit", "swin"})
    if family != "gemma2":  # which knows eager alone
        model.set_attn_implementation(implementation)
    plain, before = real_rows(model, inputs), state(model)
    with rc_probe.ablate(model, "norm@all=frozen", inputs=inputs):
        frozen = real_rows(model, inputs)
    assert torch.allclose(frozen, plain, rtol=1e-6, atol=1e-6 * float(plain.abs().max()))
    same(before, state(model))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_frozen_scales_are_those_of_the_plain_pass(family: str) -> None:
    """With a branch off besides: what each norm divides by is what it divided by with the branch on."""
    model, inputs = built(family)
    with rc_probe.ablate(model, "mlp@1=0.5+norm@all=frozen", inputs=inputs):
        found = real_rows(model, inputs)
    norms, scales = norms_of(model, family), {}
    for norm, centred in norms:
        plain = norm.forward

        def keep(x: Tensor, norm: Any = norm, centred: bool = centred, plain: Any = plain) -> Tensor:
            scales[norm] = scale_of(norm, centred, x)
            return plain(x)

        norm.forward = keep  # type: ignore[assignment]
    real_rows(model, inputs)
    for norm, centred in norms:

        def held(x: Tensor, norm: Any = norm, centred: bool = centred) -> Tensor:
            y = (x - x.mean(-1, keepdim=True) if centred else x) / scales[norm]
            return torch.addcmul(norm.bias, y, norm.weight) if centred else y * norm.weight

        norm.forward = held  # type: ignore[assignment]
    with rc_probe.ablate(model, "mlp@1=0.5", inputs=inputs):
        wanted = real_rows(model, inputs)
    close = 1e-8 if norms[0][1] is LAYER else 1e-5
    assert torch.allclose(found, wanted, rtol=close, atol=close)


def test_engine_and_context_agree() -> None:
    """Passes that begin at the first changed block have the scales of the plain pass, which is one for all."""
    model, inputs = zoo.build("bert", padded=True)
    structure = find_structure(model, inputs)
    found: dict[str, Tensor] = {}

    class Last(engine.PlainReader):
        def stream(self, name: str, layer: int, x: Tensor) -> None:
            found[name] = x.clone()

    specs = ["norm@2=frozen+mlp@2", "norm@all=frozen", "norm@3=identity", "norm@2-3=frozen+attention@3=0.5"]
    edits = {spec: parse_intervention(spec).edits(structure) for spec in specs}
    batches = [Batch(inputs, inputs["attention_mask"].bool(), 0)]
    assert engine.run(structure, batches, edits, [Last()]) == []
    base = parse_intervention("norm@1=frozen+mlp@1=0.5").edits(structure)
    with_base: dict[str, Tensor] = dict(found)
    assert engine.run(structure, batches, {specs[0]: edits[specs[0]]}, [Last()], base=base) == []
    for spec in specs:
        with rc_probe.ablate(model, spec, inputs=inputs), torch.no_grad():
            wanted = model(**inputs, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(with_base[spec], wanted), spec
    assert not torch.equal(found[specs[0]], with_base[specs[0]])
    layers: list[int] = []  # of one pass, the one before it unheard
    stream_pass(structure, inputs, edits[specs[0]], lambda layer, x: layers.append(layer))
    assert layers == [0, 1, 2, 3]


def test_the_pass_before_is_heard_by_no_other_context() -> None:
    model, inputs = zoo.build("gpt2", padded=True)
    with rc_probe.attach(model) as probe, rc_probe.ablate(model, "norm@all=frozen", inputs=inputs):
        real_rows(model, inputs)
        real_rows(model, inputs)
    with rc_probe.attach(model) as plain:
        real_rows(model, inputs)
    frame, wanted = probe.frame(), plain.frame()
    assert set(frame["count"]) == {4} and set(wanted["count"]) == {2}
    assert frame["mean"].to_numpy() == pytest.approx(wanted["mean"].to_numpy(), rel=1e-5)


def test_gradients_and_dropout_of_a_users_pass() -> None:
    """A pass with dropout and gradients: what is read is read in evaluation, and no random number is used up for it."""
    model, inputs = zoo.build("gpt2")
    model.train()
    states = []
    for spec in ("norm@all=frozen", "mlp@1=1"):
        model.zero_grad()
        torch.manual_seed(0)
        with rc_probe.ablate(model, spec, inputs=inputs):
            model(**inputs)[0].square().sum().backward()
        states.append((torch.rand(1), model.h[0].attn.c_attn.weight.grad.clone()))
        assert model.training and model.h[0].training
    assert torch.equal(states[0][0], states[1][0])
    assert float(states[0][1].abs().sum()) > 0 and not torch.equal(states[0][1], states[1][1])


def test_a_filled_cache_is_refused() -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**zoo.GPT2)).eval()
    ids = torch.arange(10, 16)[None]
    with rc_probe.ablate(model, "norm@all=frozen"):
        assert (
            model.generate(ids, max_new_tokens=2, do_sample=False, use_cache=False, pad_token_id=0).shape[1]
            == 8
        )
        with pytest.raises(RcProbeError, match="use_cache=False"):
            model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    with rc_probe.ablate(model, "norm@all=scale"):
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)


class Odd(nn.Module):
    """Two blocks whose branch reads the stream through a norm that is none of each token."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.how = norm
        self.layers = nn.ModuleList(OddBlock(norm) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class OddBlock(nn.Module):
    def __init__(self, norm: str) -> None:
        super().__init__()
        self.norm: Any = {"group": nn.GroupNorm(2, 8), "gated": nn.LayerNorm(8)}.get(norm)
        self.gate = nn.Linear(8, 1) if norm == "gated" else None
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in "qkv")

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            y = self.norm(x * self.gate(x).sigmoid())
        else:
            y = nn.functional.layer_norm(x, (8,)) if self.norm is None else self.norm(x.mT).mT
        return (
            x
            + nn.functional.scaled_dot_product_attention(
                self.q(y)[:, None], self.k(y)[:, None], self.v(y)[:, None]
            )[:, 0]
        )


@pytest.mark.parametrize(
    ("norm", "spec", "says"),
    [
        ("function", "norm@all=identity", "is no module, but the operation 'layer_norm'"),
        ("group", "norm@all=frozen", r"its norm layers.0.norm: it (is no|cannot be tried)"),
        ("group", "norm@2=scale", r"its norm layers.1.norm: it (is no|cannot be tried)"),
    ],
)
def test_norms_that_cannot_be_found_are_refused_by_name(norm: str, spec: str, says: str) -> None:
    torch.manual_seed(0)
    model, inputs = Odd(norm).eval(), {"x": torch.randn(2, 5, 8)}
    with pytest.raises(RcProbeError, match=says):
        rc_probe.ablate(model, spec, inputs=inputs)


def test_a_gate_is_no_norm() -> None:
    """What a branch reads times a number that weights make of it: the norm behind it is one all the same."""
    torch.manual_seed(0)
    structure = find_structure(Odd("gated").eval(), {"x": torch.randn(2, 5, 8)})
    assert [norm.name for norm in structure.blocks[1].every_norm] == ["layers.1.norm"]


def test_norms_of_what_branches_give_are_none_of_these() -> None:
    model, inputs = zoo.build("olmo2")
    with pytest.raises(RcProbeError, match="it has no norm on the stream or at a branch's input"):
        rc_probe.ablate(model, "norm@all=frozen", inputs=inputs)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("norm@all", "'' is nothing that a norm can be"),
        ("norm@all=frosen", "'frosen' is nothing that a norm can be"),
        ("norm@2:1=identity", "a norm is that of a whole block"),
    ],
)
def test_values_that_mean_nothing(text: str, says: str) -> None:
    with pytest.raises(RcProbeError, match=says):
        rc_probe.ablate(None, text)


MAMBA = transformers.MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2)
LFM2 = transformers.Lfm2Config(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, layer_types=["conv", "full_attention"], block_multiple_of=8,
)  # fmt: skip


@pytest.mark.parametrize("config", [MAMBA, LFM2], ids=["state space", "convolution"])
def test_skips_around_mixers_take_any_strength(config: Any) -> None:
    model = transformers.AutoModel.from_config(config).double().eval()
    inputs, strength = {"input_ids": torch.arange(20).reshape(2, 10)}, 0.7
    with rc_probe.ablate(model, f"skip@all={strength}", inputs=inputs):
        found = real_rows(model, inputs)
    if config is MAMBA:
        with rc_probe.ablate(model, f"mixer.skip@all={strength}", inputs=inputs):
            assert torch.equal(found, real_rows(model, inputs))
        with pytest.raises(RcProbeError, match=r"no block has 'attention.skip'.*"):
            rc_probe.ablate(model, "attention.skip@all=0.7", inputs=inputs)
    else:
        with rc_probe.ablate(
            model, "attention.skip@all=0.7+mixer.skip@all=0.7+mlp.skip@all=0.7", inputs=inputs
        ):
            assert torch.equal(found, real_rows(model, inputs))
    for block in model.layers:

        def forward(x: Tensor, *args: Any, block: Any = block, **kwargs: Any) -> Any:
            if config is MAMBA:
                return strength * x + block.mixer(block.norm(x))
            given = {key: kwargs[key] for key in ("position_embeddings", "attention_mask") if key in kwargs}
            y = block.operator_norm(x)
            y = block.self_attn(y, **given)[0] if block.is_attention_layer else block.conv(y)
            x = strength * x + y
            return strength * x + block.feed_forward(block.ffn_norm(x))

        block.forward = forward
    assert torch.allclose(found, real_rows(model, inputs), rtol=1e-5, atol=1e-5)
