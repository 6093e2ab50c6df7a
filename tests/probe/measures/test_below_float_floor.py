"""The tables `recursion` and `bounds` of a run: split arithmetic on the model's own blocks."""

import math
from dataclasses import replace

import pytest
import torch
from support import zoo
from support.odd_models import t5

from rc_probe.budget import Shape
from rc_probe.data.batches import Batch, batches
from rc_probe.data.samples import load_samples
from rc_probe.hooks.attach import find_structure
from rc_probe.measures.below_floor.below_float_floor import (
    Chosen,
    affordable,
    below_the_floor,
    first_sample,
)
from rc_probe.models.load import Loaded


def test_real_weights_below_the_floor(demo: Loaded) -> None:
    batch = next(iter(batches(load_samples(None, modality="text", samples=2), demo)))
    below = below_the_floor(find_structure(demo.model, batch.inputs), batch, "pretrained")
    rows = below.recursion
    assert [row["layer"] for row in rows] == list(range(7))
    for row in rows[:4]:
        assert row["residual"] == pytest.approx(row["residual_direct"], rel=1e-4)
    assert rows[6]["residual"] < 1e-30
    assert rows[6]["residual_direct"] > 1e-8
    assert all(0.02 < row["ratio_cubed"] < 5 for row in rows[1:])
    assert [row["layer"] for row in below.bounds] == [1, 2, 3, 4, 5, 6]
    for row in below.bounds:
        assert row["heads"] == 12
        assert row["residual_out"] <= row["bound_out"]
        assert row["vacuous"] == bool(row["reason"])
    assert below.bounds[0]["vacuous"]
    assert not below.bounds[-1]["vacuous"]
    assert below.notes == []


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "llama", "albert", "gemma2", "gpt_neox", "opt"])
def test_families(name: str) -> None:
    """The recursion agrees with the model's own float64 arithmetic while that has digits."""
    model, inputs = zoo.build(name, dtype=torch.float64)
    below = below_the_floor(find_structure(model, inputs), Batch(inputs, None), "pretrained")
    assert len(below.recursion) == len(zoo.ZOO[name].paths) + 1
    for row in below.recursion:
        if row["residual_direct"] > 1e-6:  # norms of some families compute in float32
            assert math.isclose(row["residual"], row["residual_direct"], rel_tol=1e-5)
    covered = name in ("bert", "vit", "albert")
    assert bool(below.bounds) == covered
    assert covered == (not any("No bound" in note for note in below.notes))


def test_what_has_no_rule_is_said_and_the_model_is_as_before() -> None:
    model, inputs = zoo.build("bert")
    strange = model.encoder.layer[1].attention.output.dense
    handle = strange.register_forward_hook(lambda module, args, out: torch.special.expm1(out))
    below = below_the_floor(find_structure(model, inputs), Batch(inputs, None), "init")
    handle.remove()
    assert below.recursion == below.bounds == []
    assert len(below.notes) == 1
    assert "block 2" in below.notes[0]
    assert "expm1" in below.notes[0]
    assert not torch.overrides._get_current_function_mode_stack()
    assert not model.encoder.layer[0]._forward_hooks


def test_a_family_without_a_rule_gets_a_note() -> None:
    model, inputs = zoo.build("xlnet")
    below = below_the_floor(find_structure(model, inputs), Batch(inputs, None), "init")
    assert below.recursion == []
    assert "`einsum` has no rule" in below.notes[0]


def test_a_decoder_that_reads_an_encoder_gets_the_reason() -> None:
    model, ids = t5(), torch.arange(10).reshape(2, 5)
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    below = below_the_floor(find_structure(model, inputs), Batch(inputs, None), "init")
    says = "was not measured, init: the blocks of this decoder add what they read from the encoder, too (cross-attention)"
    assert below.recursion == below.bounds == [] and says in below.notes[0]
    encoder = find_structure(model, inputs, stack="encoder")
    assert len(below_the_floor(encoder, Batch(inputs, None), "init").recursion) == encoder.depth + 1


def test_a_stream_that_changes_between_blocks_gets_a_note() -> None:
    model, inputs = zoo.build("swin")
    below = below_the_floor(find_structure(model, inputs), Batch(inputs, None), "init")
    assert below.recursion == []
    assert "between blocks 2 and 3" in below.notes[0]


def test_first_sample_has_no_padding() -> None:
    model, inputs = zoo.build("bert", padded=True)
    mask = inputs["attention_mask"].bool()
    mask[0, 5:] = False
    sample = first_sample(Batch(inputs, mask))
    assert sample.mask is None
    assert {value.shape for value in sample.inputs.values()} == {(1, 5)}
    structure = find_structure(model, inputs)
    assert len(below_the_floor(structure, Batch(inputs, mask), "init").recursion) == 4


def test_the_first_tokens_of_a_sample_and_no_bounds() -> None:
    """As if the text were no longer."""
    model, inputs = zoo.build("bert")
    structure = find_structure(model, inputs)
    short = Batch({name: x[:, :5] for name, x in inputs.items()}, None)
    found = below_the_floor(structure, Batch(inputs, None), "init", Chosen(tokens=5))
    wanted = below_the_floor(structure, short, "init")
    assert (found.recursion, found.bounds) == (wanted.recursion, wanted.bounds) and found.bounds
    without = below_the_floor(structure, Batch(inputs, None), "init", Chosen(5, bounds=False))
    assert (without.recursion, without.bounds) == (wanted.recursion, [])


def test_what_is_affordable() -> None:
    """Everything on usual models; within one plain pass over the run's samples on longer texts."""
    base = Shape(85_054_464, 12, 768, (12,) * 12, 128, 1)
    half = Shape(357_898_112, 24, 896, (14,) * 24, 1024, 4)
    assert affordable(base, cut=True, bounds=True) == Chosen()
    assert affordable(base, cut=True, bounds=False) == Chosen(bounds=False)
    assert affordable(half, cut=True, bounds=True) == Chosen(512, bounds=False)
    assert affordable(half, cut=False, bounds=True) is None
    room = 4 * (357_898_112 * 1024 + 2 * 24 * 896 * 1024**2)
    plain = 8 * (357_898_112 * 512 + 2 * 24 * 896 * 512**2)
    assert plain <= room < plain + 24 * 2 * (8 * 896**3 + 100 * 896 * 512**2)
    wide = replace(base, dim=6000)
    assert affordable(wide, cut=True, bounds=True) == Chosen(bounds=False), "a table is as wide as the stream"
