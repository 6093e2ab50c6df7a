"""What large models need: their own dtype, weights held once, and costs chosen from shapes."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import tiny, zoo
from support.loops import TEXTS, numpy_residual, tokenized
from torch.nn.modules.module import register_module_parameter_registration_hook

import rc_probe
from rc_probe.budget import Shape
from rc_probe.measures.curves import affordable
from rc_probe.models.fresh_weights import Blueprint, fresh_model
from rc_probe.models.load import load_model

LLAMA = tiny.SIZES | {"num_key_value_heads": 1, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small decoder stored in bfloat16."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, initializer_range=0.3))
    return tiny.saved(tmp_path_factory.mktemp("half"), model.to(torch.bfloat16), tiny.tokenizer())


def test_a_checkpoint_in_bfloat16_is_measured_in_it(half: str) -> None:
    """The statistics of its own streams, in float64 beside; floors are those of bfloat16."""
    found = rc_probe.probe(half, TEXTS, paths=False, init=False, metrics=["residual"])
    assert found.settings["dtype"] == "bfloat16" and "--dtype" not in found.settings["command"]
    rows = found.residuals[found.residuals["variant"] == "transformer"].set_index("layer")
    model = transformers.LlamaForCausalLM.from_pretrained(half, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        runs = [model(**one, output_hidden_states=True).hidden_states for one in tokenized(tiny.tokenizer())]
    for layer in (0, 1):  # the library norms the last one
        wanted = np.mean([numpy_residual(run[layer][0].double().numpy()) for run in runs])
        assert rows["mean"][layer] == pytest.approx(wanted, rel=0.02)  # padded, a batch rounds otherwise
    full = rc_probe.probe(half, TEXTS, dtype="float32", paths=False, init=False, metrics=["residual"])
    assert full.settings["dtype"] == "float32" and "--dtype float32" in full.settings["command"]
    of = full.residuals[full.residuals["variant"] == "transformer"].set_index("layer")
    assert rows["floor"][1] / of["floor"][1] == pytest.approx(2**16, rel=0.02)
    assert "bfloat16" in found.to_html()


# ---- fresh weights


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fresh_weights_have_no_float32_copy(name: str, dtype: torch.dtype) -> None:
    """They are built in their own dtype, and are the numbers of float32, rounded."""
    model, _ = zoo.build(name)
    full = fresh_model(model, 5).state_dict()
    made: list[torch.dtype] = []
    hook = register_module_parameter_registration_hook(lambda module, key, x: made.append(x.dtype))
    try:
        half = fresh_model(model.to(dtype), 5)
    finally:
        hook.remove()
    assert set(made) == {dtype} and {p.dtype for p in half.parameters()} == {dtype}
    assert all(torch.equal(x, full[key].to(x.dtype)) for key, x in half.state_dict().items())
    assert torch.get_default_dtype() == torch.float32


def test_a_truncated_normal_in_half_precision_has_its_tails_cut() -> None:
    """The steps of torch 2.6: rounded after each, some of its numbers would be infinite, and then 2."""

    class Cut(transformers.BertModel):
        def _init_weights(self, module: torch.nn.Module) -> None:
            if isinstance(module, torch.nn.Linear):
                with torch.no_grad():
                    module.weight.uniform_(-1, 1).erfinv_().mul_(0.02 * 2**0.5).clamp_(-2, 2)

    model = Cut(transformers.BertConfig(**tiny.SIZES | {"hidden_size": 64}))
    full = fresh_model(model, 1).state_dict()
    half = fresh_model(model.to(torch.bfloat16), 1).state_dict()
    weight = "encoder.layer.0.intermediate.dense.weight"
    assert full[weight].abs().max() < 0.2 and torch.equal(half[weight], full[weight].bfloat16())


def test_initialisers_that_know_no_half_precision() -> None:
    class Orthogonal(transformers.BertModel):
        def _init_weights(self, module: torch.nn.Module) -> None:
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.orthogonal_(module.weight)

    model = Orthogonal(transformers.BertConfig(**tiny.SIZES))
    full = fresh_model(model, 1).state_dict()
    half = fresh_model(model.to(torch.bfloat16), 1)
    assert all(torch.equal(x, full[key].to(x.dtype)) for key, x in half.state_dict().items())


def test_nothing_holds_weights_that_were_measured(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the pretrained ones, paths and their task included, nor those of an earlier seed."""
    alive: list[weakref.ref[torch.nn.Module]] = []
    build = Blueprint.build

    def loading(*given: Any, **options: Any) -> Any:
        loaded = load_model(*given, **options)
        alive.append(weakref.ref(loaded.model))
        return loaded

    def building(self: Blueprint, seed: int) -> Any:
        assert [ref() for ref in alive] == [None] * len(alive) != []
        fresh = build(self, seed)
        alive.append(weakref.ref(fresh))
        return fresh

    monkeypatch.setattr("rc_probe.api.load_model", loading)
    monkeypatch.setattr(Blueprint, "build", building)
    found = rc_probe.probe(half, TEXTS, dtype="float32", init_seeds=2, svd_samples=1)
    assert len(alive) == 3 and found.settings["missing"] == {}
    assert {"paths", "chains", "recursion"} <= set(found.tables)
    assert set(found.residuals["weights"]) == {"pretrained", "init"}
    assert found.model["class"] == "LlamaForCausalLM" and found.model["parameters"] > 1000


def test_a_model_that_is_held_needs_room_for_two(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(half, device="cpu")
    weights = sum(x.numel() * 2 for x in loaded.model.parameters())
    few = {"paths": False, "recursion": False, "metrics": "residual"}
    buffers = sum(x.numel() * x.element_size() for x in loaded.model.buffers())
    for room, there in ((2 * (weights + buffers), True), (2 * (weights + buffers) - 1, False)):
        monkeypatch.setattr("rc_probe.run.BOTH", room)
        found = rc_probe.probe(loaded.model, TEXTS, processor=loaded.processor, **few)
        assert (set(found.residuals["weights"]) == {"pretrained", "init"}) == there
        assert ("init" not in found.settings["missing"]) == there
    assert "Fresh weights were not measured: the model that you hold stays in memory" in found.to_html()


# ---- costs


def test_what_was_cut_is_said(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part by itself; with its switch off it is not measured, and nothing is said."""
    monkeypatch.setattr("rc_probe.budget.LEAST", 2_000_000)
    few: dict[str, Any] = {
        "paths": False,
        "init": False,
        "metrics": ("residual", "effective_rank"),
        "dtype": "float32",
    }
    found = rc_probe.probe(half, [tiny.words(40, step) for step in (1, 3, 5)], chains=True, **few)
    text = " ".join(found.model["notes"])
    assert (
        "Chained attention: " in text
        and " so that it costs no more than one plain pass over all samples" in text
    )
    assert "Below the float floor: the first 21 tokens of the sample, no bounds, so that" in text
    assert {"chains", "recursion"} <= set(found.tables)
    off = rc_probe.probe(half, TEXTS, recursion=False, attention=False, **few)
    assert off.model["notes"] == [] and not {"chains", "recursion"} & set(off.tables)


def test_no_head_runs_where_no_score_needs_it(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attaching looks at small inputs as a whole; the run's own batches end behind the last block, proofs included."""
    tokens: list[int] = []
    loaded = load_model(half, dtype="float32")
    loaded.model.lm_head.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    texts = [tiny.words(40, step) for step in (1, 3, 5)]
    few: dict[str, Any] = {
        "paths": False,
        "init": False,
        "chains": True,
        "recursion": True,
        "embeddings": False,
    }
    found = rc_probe.probe(loaded.model, texts, processor=loaded.processor, ablate="mlp@2", **few)
    assert {"residuals", "recursion", "chains", "ablations"} <= set(found.tables)
    assert tokens and max(tokens) <= 16


def test_ranks_that_are_affordable() -> None:
    base = Shape(85_054_464, 12, 768, (12,) * 12, 128, 32)
    long = Shape(357_898_112, 24, 896, (14,) * 24, 1024, 4)
    assert [affordable(base, 4), affordable(replace(base, samples=1), 16), affordable(long, 4)] == [4, 4, 2]
    one = 4 * 25 * 16 * 1024 * 896**2  # variants, layers, a matrix
    assert 2 * one <= 2 * 4 * (357_898_112 * 1024 + 2 * 24 * 896 * 1024**2) < 3 * one
    assert affordable(replace(long, half=True), 4) == 1
