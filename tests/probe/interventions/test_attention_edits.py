"""Masks, temperatures and patterns, against attention written by hand in plain loops and float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support import tiny, zoo
from support.untouched import same, state
from torch import Tensor

import rc_probe
from rc_probe import RcProbeError
from rc_probe.hooks.attach import find_structure

F = torch.nn.functional
Sees = Callable[[int, int], bool]  # query, key, from 0; of the real tokens of a row
Weigh = Callable[[Tensor, Tensor], Tensor]  # pattern, uniform pattern -> pattern


def allowed(mask: Tensor, sees: Sees) -> Tensor:
    """(batch, 1, tokens, tokens) bool, by loops. A padding token sees itself, so that no row is empty."""
    found = torch.zeros(len(mask), 1, mask.shape[1], mask.shape[1], dtype=torch.bool)
    for row, real in enumerate(mask.tolist()):
        for i in range(len(real)):
            for j in range(len(real)):
                found[row, 0, i, j] = i == j or bool(real[j] and sees(i, j))
    return found


def by_hand(seen: Tensor | None, temperature: float = 1.0, weigh: Weigh = lambda a, j: a) -> Any:
    """torch's attention in plain operations; seen: what is seen in place of what its mask says, None for the mask's."""

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale) / temperature
        own = torch.ones(scores.shape[-2:], dtype=torch.bool)
        own = own.tril() if is_causal else own
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            own = attn_mask
        elif attn_mask is not None:
            own = attn_mask > -1e4
            scores = scores + attn_mask.masked_fill(~own, 0)
        here = own if seen is None else seen
        pattern = scores.masked_fill(~here, -torch.inf).softmax(-1)
        uniform = here / here.sum(-1, keepdim=True).clamp_min(1)
        return weigh(pattern, uniform.to(pattern)) @ value

    return attention


def real_rows(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model(**inputs)[0]
    mask = inputs.get("attention_mask")
    return hidden if mask is None else hidden[mask.bool()]


CAUSAL = {"gpt2", "llama", "mistral", "falcon"}
RULES: dict[str, Callable[[bool], Sees]] = {
    "complete": lambda causal: lambda i, j: True,
    "causal": lambda causal: lambda i, j: j <= i,
    "window:2": lambda causal: lambda i, j: abs(i - j) <= 2 and (j <= i or not causal),
    "left:3": lambda causal: lambda i, j: 0 <= i - j <= 3,
}
FAMILIES = ["bert", "gpt2", "llama", "mistral", "vit", "t5_encoder", "modernbert", "falcon"]


def built(family: str) -> tuple[Any, dict[str, Any], Tensor]:
    """In float64, padded; the mask of its real tokens."""
    model, inputs = zoo.build(family, dtype=torch.float64, padded=family != "vit")
    mask = inputs.get("attention_mask")
    with torch.no_grad():
        tokens = model(**inputs)[0].shape[1]
    return model, inputs, torch.ones(2, tokens, dtype=torch.long) if mask is None else mask


@pytest.mark.parametrize("value", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_of_attention_by_hand(
    family: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, mask = built(family)
    sees = RULES[value](family in CAUSAL)
    before = state(model)
    with rc_probe.ablate(model, f"mask@all={value}", inputs=inputs):
        found = real_rows(model, inputs)
    same(before, state(model))
    if family != "falcon":  # which calls torch's attention itself
        model.set_attn_implementation("eager")
        with rc_probe.ablate(model, f"mask@all={value}", inputs=inputs):
            eager = real_rows(model, inputs)
        model.set_attn_implementation("sdpa")
        assert torch.allclose(eager, found, rtol=1e-5, atol=1e-5)  # its softmax is in float32
    monkeypatch.setattr(F, "scaled_dot_product_attention", by_hand(allowed(mask, sees)))
    assert torch.allclose(found, real_rows(model, inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5_encoder"])
def test_a_mask_is_the_same_as_a_four_dimensional_one_given_to_the_eager_model(family: str) -> None:
    """ViT takes no mask: for it the test above stands."""
    model, inputs = zoo.build(family, padded=True)
    model.set_attn_implementation("eager")
    mask, sees = inputs["attention_mask"], RULES["window:2"](family in CAUSAL)
    least = torch.finfo(torch.float32).min
    additive = torch.zeros(allowed(mask, sees).shape).masked_fill(~allowed(mask, sees), least)
    with rc_probe.ablate(model, "mask@all=window:2", inputs=inputs):
        found = real_rows(model, inputs)
    with torch.no_grad():
        wanted = model(**inputs | {"attention_mask": additive})[0][mask.bool()]
        assert not torch.allclose(real_rows(model, inputs), wanted, atol=1e-2)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_sinks_are_the_first_real_tokens_on_whichever_side_padding_is(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, _ = built(family)
    mask = inputs["attention_mask"] = inputs["attention_mask"].flip(1)  # at the left
    inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    first = [row.index(1) for row in mask.tolist()]
    seen = torch.cat(
        [
            allowed(mask[r : r + 1], lambda i, j, r=r: (0 <= i - j <= 1 or j < first[r] + 2) and (j <= i or family == "bert"))
            for r in range(2)
        ]
    )  # fmt: skip
    with rc_probe.ablate(model, "mask@all=sink:2,left:1", inputs=inputs):
        found = real_rows(model, inputs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", by_hand(seen))
    assert torch.allclose(found, real_rows(model, inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", [*FAMILIES, "swin"])
@pytest.mark.parametrize(
    ("spec", "how"),
    [
        ("temperature@all=0.25", {"temperature": 0.25}),
        ("pattern@all=centred", {"weigh": lambda a, j: a - j}),
        ("pattern@all=sharpened:0.5", {"weigh": lambda a, j: j + 1.5 * (a - j)}),
        ("pattern@all=sharpened:2+temperature@all=4", {"temperature": 4, "weigh": lambda a, j: j + 3 * (a - j)}),
    ],
)  # fmt: skip
def test_temperatures_and_patterns_are_those_of_attention_by_hand(
    family: str, spec: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = zoo.build(family, dtype=torch.float64, padded=family not in {"vit", "swin"})
    with rc_probe.ablate(model, spec, inputs=inputs):
        found = real_rows(model, inputs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", by_hand(None, **how))
    assert torch.allclose(found, real_rows(model, inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "order", ["mask@all=window:2+pattern@all=centred", "pattern@all=centred+mask@all=window:2"]
)
def test_a_pattern_is_that_of_the_mask_that_is_there_in_whatever_order(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, mask = built("bert")
    with rc_probe.ablate(model, order, inputs=inputs):
        found = real_rows(model, inputs)
    seen = allowed(mask, lambda i, j: abs(i - j) <= 2)
    monkeypatch.setattr(F, "scaled_dot_product_attention", by_hand(seen, weigh=lambda a, j: a - j))
    assert torch.allclose(found, real_rows(model, inputs), rtol=1e-9, atol=1e-9)


def test_one_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, mask = built("bert")
    with rc_probe.ablate(model, "mask@2=left:0", inputs=inputs):
        found = real_rows(model, inputs)
    calls, plain = [0], F.scaled_dot_product_attention
    edited = by_hand(allowed(mask, lambda i, j: i == j))

    def second(*args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        out: Tensor = (edited if calls[0] == 2 else plain)(*args, **kwargs)
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", second)
    assert torch.allclose(found, real_rows(model, inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "spec"),
    [
        *[(family, "mask@all=causal") for family in ("gpt2", "llama", "bloom", "gptj", "falcon")],
        *[(family, "mask@all=complete") for family in ("bert", "vit", "t5_encoder", "deberta_v2", "xlnet")],
        *[(family, "temperature@all=1") for family in ("bert", "llama", "t5_encoder", "swin")],
        *[(family, "pattern@all=sharpened:0") for family in ("bert", "llama", "bloom")],
    ],
)
def test_what_changes_nothing_is_the_plain_model_to_the_last_bit(
    family: str, spec: str, implementation: str
) -> None:
    model, inputs = zoo.build(family, padded=family not in {"vit", "swin"})
    if implementation == "eager":
        model.set_attn_implementation("eager")
    plain = real_rows(model, inputs)
    with rc_probe.ablate(model, spec, inputs=inputs):
        assert torch.equal(real_rows(model, inputs), plain)


def test_a_mask_of_scores_that_a_model_has_added_its_biases_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bloom takes the softmax itself: what it lets through can be masked further."""
    model, inputs = zoo.build("bloom", padded=True)
    with rc_probe.ablate(model, "mask@all=left:2", inputs=inputs):
        found = real_rows(model, inputs)
    seen, softmax = allowed(inputs["attention_mask"], lambda i, j: 0 <= i - j <= 2), F.softmax
    monkeypatch.setattr(
        F, "softmax", lambda x, *args, **kwargs: softmax(x.masked_fill(~seen, -torch.inf), *args, **kwargs)
    )
    assert torch.allclose(found, real_rows(model, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "spec", "says"),
    [
        ("bloom", "mask@all=complete", "its scores are seen only where its own mask lets them"),
        ("bloom", "temperature@all=2", "its scaled scores cannot be divided"),
        ("swin", "mask@all=causal", "within windows or patches"),
        ("mamba", "mask@all=causal", "it has no attention"),
    ],
)
def test_what_cannot_be_changed_is_refused(family: str, spec: str, says: str) -> None:
    if family == "mamba":
        config = transformers.MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2)
        model, inputs = transformers.MambaModel(config).eval(), {"input_ids": torch.arange(10)[None]}
    else:
        model, inputs = zoo.build(family)
    with (
        pytest.raises(RcProbeError, match=says),
        rc_probe.ablate(model, spec, inputs=inputs),
        torch.no_grad(),
    ):
        model(**inputs)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mask@all", "'' is no mask"),
        ("mask@all=windw:3", "'windw:3' is no mask"),
        ("mask@all=window", "'window' is no mask"),
        ("mask@all=causal:3", "'causal:3' is no mask"),
        ("mask@all=causal,window:3", "'causal' cannot be joined"),
        ("mask@all=window:3,window:4", "'window' cannot be joined"),
        ("mask@2:1=causal", "a mask is that of all heads"),
        ("temperature@all=0", "'0' is not above 0"),
        ("temperature@all=hot", "'hot' is not a number"),
        ("pattern@all=sharp", "'sharp' is no pattern"),
        ("pattern@all=sharpened:inf", "'inf' is not a finite number"),
    ],
)
def test_values_that_mean_nothing(text: str, says: str) -> None:
    with pytest.raises(RcProbeError, match=says):
        rc_probe.ablate(None, text)


def test_padding_of_labels_alone_is_never_seen() -> None:
    """What a decoder makes of labels: the same as of its inputs and their mask, given by themselves."""
    torch.manual_seed(0)
    config = transformers.T5Config(**tiny.T5_SIZES, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    model = transformers.T5ForConditionalGeneration(config).double().eval()
    text = torch.arange(2, 12).reshape(2, 5)
    labels = torch.tensor([[5, 6, 7, 8, 9, 1], [4, 3, 1, -100, -100, -100]])
    shifted = torch.tensor([[0, 5, 6, 7, 8, 9], [0, 4, 3, 1, 0, 0]])
    with rc_probe.ablate(model, "mask@all=complete"), torch.no_grad():
        alone = model(input_ids=text, labels=labels).logits
        given = model(
            input_ids=text, decoder_input_ids=shifted, decoder_attention_mask=(labels != -100).long()
        ).logits
        unseen = model(input_ids=text, decoder_input_ids=shifted).logits
    real = labels != -100
    assert torch.equal(alone[real], given[real])
    assert not torch.allclose(alone[real], unseen[real])


def test_engine_and_context_agree() -> None:
    """Passes that begin at their edits see the mask of the whole model's inputs, too."""
    from rc_probe import engine
    from rc_probe.data.batches import Batch
    from rc_probe.interventions.grammar import parse_intervention

    model, inputs = zoo.build("bert", padded=True)
    structure = find_structure(model, inputs)
    found: dict[str, Tensor] = {}

    class Last(engine.PlainReader):
        def stream(self, name: str, layer: int, x: Tensor) -> None:
            found[name] = x.clone()

    specs = ["mask@3=window:1", "temperature@2=0.5+mask@3=causal", "pattern@2-3=centred"]
    edits = {spec: parse_intervention(spec).edits(structure) for spec in specs}
    assert engine.run(structure, [Batch(inputs, inputs["attention_mask"].bool(), 0)], edits, [Last()]) == []
    for spec in specs:
        with rc_probe.ablate(model, spec, inputs=inputs), torch.no_grad():
            assert torch.equal(found[spec], model(**inputs, output_hidden_states=True).hidden_states[-1])


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_every_skip_of_a_block(strength: float) -> None:
    model, inputs = zoo.build("gpt2", dtype=torch.float64, padded=True)
    with rc_probe.ablate(model, f"skip@2={strength}", inputs=inputs):
        found = real_rows(model, inputs)
    with rc_probe.ablate(model, f"attention.skip@2={strength}+mlp.skip@2={strength}", inputs=inputs):
        assert torch.equal(found, real_rows(model, inputs))
    second = model.h[1]

    def block(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = strength * x + second.attn(second.ln_1(x), attention_mask=kwargs.get("attention_mask"))[0]
        return strength * x + second.mlp(second.ln_2(x))

    second.forward = block
    assert torch.allclose(found, real_rows(model, inputs), rtol=1e-9, atol=1e-9)
