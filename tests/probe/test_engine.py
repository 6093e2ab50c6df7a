"""The engine: what readers get is what full passes give, and a model that cannot take shortcuts is measured all the same."""

from typing import Any

import pytest
import torch
from support import zoo
from torch import Tensor

from rc_probe import engine
from rc_probe.data.batches import Batch
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.gates import Gate, gate_edits
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.errors import RcProbeError
from rc_probe.interventions.grammar import parse_intervention
from rc_probe.interventions.paper import paper_variants
from rc_probe.measures.variant_passes import measure_variants

TEXTS = ("mlp@3", "attention.skip@2-3", "head@2:1", "block@2", "mlp@1+attention@3=0.5")


class Outputs:
    """Keeps what the model returned, and which streams came."""

    wants_output = True

    def __init__(self) -> None:
        self.outputs: dict[str, list[Tensor]] = {}
        self.layers: dict[str, list[int]] = {}

    def begin(self, batch: Batch) -> None:
        self.layers = {}

    def stream(self, name: str, layer: int, x: Tensor) -> None:
        self.layers.setdefault(name, []).append(layer)

    def as_plain(self, name: str, layers: range) -> None:
        self.layers.setdefault(name, []).extend(layers)

    def output(self, name: str, output: Any) -> None:
        self.outputs.setdefault(name, []).append(output.logits.clone())


def padded(inputs: dict[str, Tensor], start: int) -> Batch:
    """The first half of the samples one token shorter than the second."""
    mask = torch.ones(inputs["input_ids"].shape, dtype=torch.bool)
    mask[: len(mask) // 2, -1] = False
    return Batch({**inputs, "attention_mask": mask.long()}, mask, start)


@pytest.mark.parametrize("name", ["bert_mlm", "gpt2_lm"])
def test_the_curves_are_those_of_full_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = zoo.build(name)
    structure = find_structure(model, inputs)
    rows = inputs["input_ids"].shape[0]
    batches = [padded(inputs, 0), padded({k: v.flip(0) for k, v in inputs.items()}, rows)]
    variants = [*paper_variants(structure), *map(parse_intervention, TEXTS)]
    short, notes = measure_variants(
        structure, batches, variants, ["residual", "cosine", "stable_rank"], few=3
    )
    assert notes == []
    monkeypatch.setattr(engine, "shortcut_problem", lambda *_: "for this test")
    full, notes = measure_variants(structure, batches, variants, ["residual", "cosine", "stable_rank"], few=3)
    assert notes == ["Every pass was a full one: for this test."]
    for variant in variants:
        assert short[variant.name].rows() == full[variant.name].rows(), variant.name
        assert len(short[variant.name].rows()) == 3 * (structure.depth + 1)


def test_readers_get_every_layer_and_the_outputs_of_the_model_itself() -> None:
    model, inputs = zoo.build("bert_mlm")
    structure = find_structure(model, inputs)
    edits = {text: parse_intervention(text).edits(structure) for text in TEXTS}
    reader = Outputs()
    engine.run(structure, [padded(inputs, 0)], {"transformer": gate_edits(structure, []), **edits}, [reader])
    assert all(layers == list(range(structure.depth + 1)) for layers in reader.layers.values())
    assert list(reader.layers) == ["transformer", *TEXTS]
    with measuring(model):
        left_out = model.bert.encoder.layer
        model.bert.encoder.layer = torch.nn.ModuleList([left_out[0], left_out[2]])
        expected = model(**padded(inputs, 0).inputs).logits
        model.bert.encoder.layer = left_out
    assert torch.equal(reader.outputs["block@2"][0], expected)


def test_edits_of_every_pass() -> None:
    model, inputs = zoo.build("gpt2_lm")
    structure = find_structure(model, inputs)
    one, two = (gate_edits(structure, [Gate("mlp", (n,))]) for n in (1, 3))
    with_base, alone = Outputs(), Outputs()
    engine.run(structure, [padded(inputs, 0)], {"more": two}, [with_base], base=one)
    engine.run(structure, [padded(inputs, 0)], {"one": one, "both": one.then(two)}, [alone])
    assert torch.equal(with_base.outputs["transformer"][0], alone.outputs["one"][0])
    assert torch.equal(with_base.outputs["more"][0], alone.outputs["both"][0])


def test_a_batch_on_which_a_shortcut_differs_is_measured_by_full_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = zoo.build("bert_mlm")
    structure = find_structure(model, inputs)
    edits = gate_edits(structure, [Gate("mlp", (3,))])
    monkeypatch.setattr(engine, "batch_problem", lambda *_, **how: "block 1 returns other numbers")
    reader, whole = Outputs(), Outputs()
    notes = engine.run(structure, [padded(inputs, 0)], {"mlp@3": edits}, [reader])
    assert notes == ["Every pass was a full one: block 1 returns other numbers."]
    monkeypatch.undo()
    engine.run(structure, [padded(inputs, 0)], {"mlp@3": edits}, [whole])
    assert torch.equal(reader.outputs["mlp@3"][0], whole.outputs["mlp@3"][0])


def test_a_range_without_end_is_refused_at_once() -> None:
    for text in ("mlp@1-1000000000", "mlp@1-99999999999999999999", "head@1:99999"):
        with pytest.raises(RcProbeError, match="is beyond 9,999"):
            parse_intervention(text)
    with pytest.raises(RcProbeError, match="'block' can only be removed"):
        parse_intervention("block@2=0.5")
