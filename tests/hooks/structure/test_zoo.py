"""The zoo is what it says: every block is called where the table says, and no parameter hides a term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import zoo
from torch import Tensor


def run(model: Any, inputs: zoo.Inputs) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs)[0]
    return out


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, family in zoo.ZOO.items() for dtype in family.dtypes], ids=str
)
def test_output_is_finite_and_varies(name: str, dtype: torch.dtype) -> None:
    model, inputs = zoo.build(name, dtype=dtype, batch=3, padded=True)
    out = run(model, inputs)
    assert out.dtype is dtype
    assert out.isfinite().all()
    assert 0.1 < out.float().std() < 50


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_same_arguments_give_the_same_model_and_leave_the_random_state(name: str) -> None:
    before = torch.get_rng_state()
    first, second, other = run(*zoo.build(name)), run(*zoo.build(name)), run(*zoo.build(name, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.allclose(first, other, atol=1e-3)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_no_parameter_is_constant(name: str) -> None:
    model, _ = zoo.build(name)
    assert [key for key, value in model.named_parameters() if value.numel() > 1 and value.std() < 0.01] == []


@pytest.mark.parametrize("name", zoo.TRANSFORMERS)
def test_blocks_are_called_where_the_table_says(name: str) -> None:
    model, inputs = zoo.build(name)
    calls: list[str] = []
    for path in set(zoo.ZOO[name].paths):
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: calls.append(path))
    run(model, inputs)
    assert tuple(calls) == zoo.ZOO[name].paths


@pytest.mark.parametrize("name", [name for name in zoo.TRANSFORMERS if zoo.ZOO[name].modality == "text"])
def test_padding_is_hidden_from_the_real_tokens(name: str) -> None:
    model, inputs = zoo.build(name, batch=3, padded=True)
    mask = inputs["attention_mask"].bool()
    assert mask[0].all()
    assert not mask[1:].all(dim=1).any()
    changed = inputs | {"input_ids": inputs["input_ids"].where(mask, zoo.VOCAB - 1)}
    before, after = run(model, inputs), run(model, changed)
    if before.shape[:2] == mask.shape:
        before, after = before[mask], after[mask]
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)
