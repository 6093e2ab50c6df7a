"""The census builds and runs types of every input pattern; its workers outlive any task."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch

from rc_probe.census.build import build
from rc_probe.census.inputs import floats, inputs_for
from rc_probe.census.workers import Failed, run

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


def test_workers_outlive_good_raising_exiting_and_sleeping_tasks() -> None:
    def task(name: str) -> str:
        if name == "raises":
            raise ValueError("two\nlines")
        if name == "exits":
            os._exit(3)
        if name == "sleeps":
            time.sleep(60)
        return name * 100_000  # more than a pipe holds

    start = time.monotonic()
    results = dict(run(["a", "raises", "exits", "sleeps", "b"], task, processes=2, seconds=2))
    assert time.monotonic() - start < 20
    assert results.pop("a") == "a" * 100_000
    assert results.pop("b") == "b" * 100_000
    assert all(isinstance(value, Failed) for value in results.values())
    assert results == {
        "raises": "ValueError: two lines",
        "exits": "exited with code 3",
        "sleeps": "took more than 2 s",
    }
