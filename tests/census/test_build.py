"""The census builds and runs types of every input pattern; its workers outlive any task."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from census.build import NotBuilt, build, category, model_types
from census.inputs import floats, inputs_for
from census.sizes import parts, tiny
from census.workers import Failed, run
from support.places import ROOT
from transformers import CONFIG_MAPPING

# one type for each pattern of inputs, with keys that must be among them
PATTERNS = {
    "bert": {"input_ids", "attention_mask", "token_type_ids"},
    "gpt2": {"input_ids", "attention_mask"},
    "mixtral": {"input_ids"},
    "t5": {"input_ids", "decoder_input_ids"},
    "vit": {"pixel_values"},
    "swin": {"pixel_values"},
    "wav2vec2": {"input_values"},
    "whisper": {"input_features", "decoder_input_ids"},
    "clip": {"input_ids", "pixel_values"},
    "llava": {"input_ids", "pixel_values"},
    "qwen2_vl": {"input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids"},
    "gemma3": {"input_ids", "pixel_values"},
}


def outputs(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return floats(model(**inputs))


@pytest.mark.parametrize("model_type", PATTERNS)
def test_every_pattern_runs_is_finite_and_depends_on_its_inputs(model_type: str) -> None:
    model = build(model_type)
    inputs = inputs_for(model)
    assert PATTERNS[model_type] <= set(inputs)
    first, again = outputs(model, inputs), outputs(model, inputs)
    other = outputs(model, inputs_for(model, seed=1))
    assert all(tensor.isfinite().all() for tensor in first)
    assert all(map(torch.equal, first, again))
    assert not torch.allclose(first[0], other[0], atol=1e-3)


@pytest.mark.parametrize("model_type", ["bert", "qwen2_vl", "swin"])
def test_the_same_arguments_give_the_same_model_and_leave_the_random_state(model_type: str) -> None:
    before = torch.get_rng_state()
    first, second, other = build(model_type), build(model_type), build(model_type, seed=1)
    inputs, same = inputs_for(first), inputs_for(second)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not any(torch.equal(a, c) for a, _, c in pairs)
    assert all(torch.equal(inputs[key], same[key]) for key in inputs)


@pytest.mark.parametrize("model_type", PATTERNS)
def test_no_parameter_is_constant(model_type: str) -> None:
    model = build(model_type)
    constant = [k for k, v in model.named_parameters() if v.numel() > 1 and v.std() < 0.01]
    assert constant == []
    assert sum(parameter.numel() for parameter in model.parameters()) < 5_000_000


@pytest.mark.parametrize("model_type", ["bert", "xlnet", "llava"])
def test_padding_is_masked_where_the_family_pads(model_type: str) -> None:
    model = build(model_type)
    full, padded = inputs_for(model, batch=3), inputs_for(model, batch=3, padded=True)
    mask = padded["attention_mask"]
    assert full["attention_mask"].all()
    assert mask[0].all()
    assert mask[1].sum() > mask[2].sum()
    assert bool(mask[2, -1]) is (model_type == "xlnet")


@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl", "gemma4", "whisper", "segformer"])
def test_sizes_fit_in_every_part_and_special_tokens_stay_apart(model_type: str) -> None:
    config = tiny(CONFIG_MAPPING[model_type])
    for part in parts(config):
        assert len(getattr(part, "layer_types", None) or [None] * 3) == 3
        width, heads = getattr(part, "hidden_size", 64), getattr(part, "num_attention_heads", 4)
        assert width == 64 or model_type == "segformer"
        assert isinstance(heads, list | tuple) or width % heads == 0
    default = CONFIG_MAPPING[model_type]()
    names = [
        name
        for name in vars(default)
        if name.endswith("_token_id") and isinstance(getattr(default, name), int)
    ]
    assert all(getattr(config, name) < 40 for name in names)
    assert len({getattr(config, name) for name in names}) == len({getattr(default, name) for name in names})


def test_layers_of_every_kind_are_kept() -> None:
    assert set(tiny(CONFIG_MAPPING["gemma3_text"]).layer_types) == {"sliding_attention", "full_attention"}


def test_categories_come_from_the_tasks() -> None:
    types = {"text encoder": "bert", "text decoder": "gpt2", "text encoder-decoder": "t5", "vision": "vit"}
    types |= {"audio": "wav2vec2", "multimodal": "llava"}
    assert {name: category(model_type) for name, model_type in types.items()} == {
        name: name for name in types
    }
    assert set(types.values()) <= set(model_types())


def test_what_cannot_be_built_says_why_in_one_line() -> None:
    with pytest.raises(NotBuilt, match=r"^needs natten$"):
        build("dinat")


def test_workers_outlive_good_raising_exiting_and_sleeping_tasks() -> None:
    def task(name: str) -> str:
        if name == "raises":
            raise ValueError("two\nlines")
        if name == "exits":
            os._exit(3)
        if name == "sleeps":
            time.sleep(600)  # longer than the tests may take
        return name * 100_000  # more than a pipe holds

    results = dict(run(["a", "raises", "exits", "sleeps", "b"], task, processes=2, seconds=2))
    assert results.pop("a") == "a" * 100_000
    assert results.pop("b") == "b" * 100_000
    assert all(isinstance(value, Failed) for value in results.values())
    assert results == {
        "raises": "ValueError: two lines",
        "exits": "exited with code 3",
        "sleeps": "took more than 2 s",
    }


def test_the_command_runs_from_the_root_of_the_repository() -> None:
    """It gets as far as the list of types, which lies beside it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [sys.executable, "tests/census", "no-such-type"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no model type 'no-such-type'" in done.stderr
