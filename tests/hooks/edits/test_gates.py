"""Gates against forward passes written by hand, and against running without them."""

import itertools
from typing import Any

import pytest
import torch
from support import reference, zoo
from support.streams import PROVED, same, streams
from support.structures import with_block
from torch import Tensor

from rc_probe import Gate, RcProbeError
from rc_probe.data.batches import Batch, batches
from rc_probe.data.samples import load_samples
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.edits import Editing, Edits
from rc_probe.hooks.edits.gates import gate_edits
from rc_probe.interventions.grammar import parse_intervention
from rc_probe.interventions.paper import paper_variants
from rc_probe.models.load import Loaded

BY_HAND = ["bert", "gpt2", "vit", "llama"]


def by_hand(name: str, model: Any, inputs: dict[str, Any], **how: Any) -> list[Tensor]:
    with torch.no_grad():
        return reference.streams(name, model.state_dict(), model.config, inputs, **how)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", reference.VARIANTS)
@pytest.mark.parametrize("name", BY_HAND)
def test_the_papers_variants_by_hand(name: str, variant: str, padded: bool) -> None:
    model, inputs = zoo.build(name, padded=padded and name != "vit")
    structure = find_structure(model, inputs)
    gates = next(v for v in paper_variants(structure) if v.name == variant)
    same(streams(structure, inputs, gates), by_hand(name, model, inputs, variant=variant))


@pytest.mark.parametrize("variant", reference.VARIANTS)
def test_the_papers_variants_on_real_weights(demo: Loaded, variant: str) -> None:
    samples = load_samples(
        ["A short text.", "One that is rather longer, so that the first is padded."], modality="text"
    )
    batch: Batch = next(iter(batches(samples, demo)))
    structure = find_structure(demo.model, batch.inputs)
    gates = next(v for v in paper_variants(structure) if v.name == variant)
    found = streams(structure, batch.inputs, gates)
    wanted = by_hand("bert", demo.model, batch.inputs, variant=variant)
    assert batch.mask is not None
    assert len(found) == 7
    for x, y in zip(found, wanted, strict=True):
        real = batch.mask
        assert torch.equal(x[real], y[real])


@pytest.mark.parametrize("name", BY_HAND)
def test_every_combination_of_gates_at_one_block(name: str) -> None:
    model, inputs = zoo.build(name)
    structure = find_structure(model, inputs)
    parts = ("attention", "attention.skip", "mlp", "mlp.skip")
    for values in itertools.product((0.0, 1.0), repeat=4):
        gates = [Gate(part, (2,), value=v) for part, v in zip(parts, values, strict=True)]
        edits = {2: dict(zip(parts, values, strict=True))}
        same(streams(structure, inputs, gates), by_hand(name, model, inputs, edits=edits))


@pytest.mark.parametrize("name", BY_HAND)
def test_gates_that_are_neither_0_nor_1(name: str) -> None:
    model, inputs = zoo.build(name)
    structure = find_structure(model, inputs)
    gates = [Gate("attention", (1,), value=0.5), Gate("mlp.skip", (3,), value=2.0)]
    same(
        streams(structure, inputs, gates),
        by_hand(name, model, inputs, edits={1: {"attention": 0.5}, 3: {"mlp.skip": 2.0}}),
    )


@pytest.mark.parametrize("name", [*BY_HAND, "xlnet", "opt", "gpt_neox", "falcon", "albert"])
def test_gates_per_sample_equal_runs_one_by_one(name: str) -> None:
    model, inputs = zoo.build(name)
    structure = find_structure(model, inputs)
    for component in ("attention", "attention.skip", "mlp"):
        together = streams(structure, inputs, [Gate(component, (2,), value=torch.tensor([0.0, 0.5]))])
        for sample, value in enumerate((0.0, 0.5)):
            alone = streams(structure, inputs, [Gate(component, (2,), value=value)])
            for x, y in zip(together, alone, strict=True):
                assert torch.equal(x[sample], y[sample])


@pytest.mark.parametrize("name", PROVED)
def test_gates_at_1_are_bitwise_plain(name: str) -> None:
    model, inputs = zoo.build(name)
    structure = find_structure(model, inputs)
    kinds = {b.kind for block in structure.blocks for b in block.branches}
    gates = [Gate(part, value=torch.ones(2)) for kind in kinds for part in (kind, f"{kind}.skip")]
    gates = [g for g in gates if not (g.component == "mlp.skip" and "+" in structure.signature)]
    same(streams(structure, inputs, gates), streams(structure, inputs))


@pytest.mark.parametrize("name", PROVED)
def test_without_branches_the_stream_is_unchanged_or_normed(name: str) -> None:
    model, inputs = zoo.build(name)
    structure = find_structure(model, inputs)
    found = streams(structure, inputs, [Gate("attention"), Gate("mlp")])
    for block, before, after in zip(structure.blocks, found, found[1:], strict=False):
        expected = before
        for norm in (*block.norms, *(n for j in block.junctions for n in j.norms)):
            expected = model.get_submodule(norm.name)(expected)
        if before.shape == after.shape:  # stages of Swin change the width in between
            merged = name == "swin" and block.index == 1
            assert merged or torch.equal(expected, after)


@pytest.mark.parametrize("name", [n for n in PROVED if zoo.ZOO[n].signature == "A+M"])
def test_parallel_blocks_have_one_skip(name: str) -> None:
    model, inputs = zoo.build(name)
    structure = find_structure(model, inputs)
    with pytest.raises(RcProbeError, match=r"no .*'mlp\.skip'"):
        gate_edits(structure, [Gate("mlp.skip", (1,))])
    whole = streams(structure, inputs)
    branches = streams(structure, inputs, [Gate("attention.skip", (1,))])
    torch.testing.assert_close(branches[1] + whole[0], whole[1])


@pytest.mark.parametrize("name", BY_HAND)
def test_one_head_off_by_hand(name: str) -> None:
    model, inputs = zoo.build(name)
    structure = find_structure(model, inputs)
    same(
        streams(structure, inputs, [Gate("head", (2,), heads=(3,))]),
        by_hand(name, model, inputs, edits={2: {"heads": [1.0, 1.0, 0.0, 1.0]}}),
    )


@pytest.mark.parametrize(
    "text", ["attention.skip@2-3", "mlp@1,3", "mlp.sublayer", "attention@all", "mlp=0.5"]
)
def test_ablations_as_text_by_hand(text: str) -> None:
    model, inputs = zoo.build("bert")
    structure = find_structure(model, inputs)
    component = text.split("@", maxsplit=1)[0].split("=", maxsplit=1)[0]
    blocks = {"attention.skip@2-3": (2, 3), "mlp@1,3": (1, 3)}.get(text, (1, 2, 3))
    value = 0.5 if "=" in text else 0.0
    same(
        streams(structure, inputs, parse_intervention(text)),
        by_hand("bert", model, inputs, edits={b: {component: value} for b in blocks}),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("atention@2", "did you mean 'attention'"),
        ("mlp@0", "no block 0"),
        ("mlp@4", "no block 4"),
        ("head@2:5", "no head 5"),
        ("head@2", "head@BLOCK:HEAD"),
        ("mlp@2:3", "only 'head'"),
        ("mlp@5-3", "backwards"),
        ("mlp@two", "not a number"),
        ("mlp=half", "not a number"),
        ("mlp=1e400", "not a finite number"),
        ("mlp.sublayer=0.5", "only be removed"),
        ("cross@1", "no 'cross'"),
        ("mixer", "no block has 'mixer'"),
        ("", "not an intervention"),
        ("mlp@@3", "not a number"),
    ],
)
def test_misspelt_and_impossible_ablations(text: str, says: str) -> None:
    model, inputs = zoo.build("bert")
    structure = find_structure(model, inputs)
    with pytest.raises(RcProbeError, match=says):
        parse_intervention(text).edits(structure)


def test_a_block_that_runs_otherwise_than_when_attached_is_an_error() -> None:
    model, inputs = zoo.build("bert")
    structure = find_structure(model, inputs)
    more = structure.blocks[1].adds + 1
    edits = Edits()
    edits.at(structure.blocks[1].junctions[0].skip, lambda x: x)
    with pytest.raises(RcProbeError, match="block 2"), Editing(with_block(structure, 1, adds=more), edits):
        model(**inputs)
    with pytest.raises(RcProbeError, match="block 3"):  # also where the pass ends early
        streams(with_block(structure, -1, adds=more), inputs, [Gate("mlp")])


@pytest.mark.parametrize("name", ["albert", "bert"])
def test_a_pass_that_failed_half_way_leaves_the_next_one_right(name: str) -> None:
    model, inputs = zoo.build(name)
    structure = find_structure(model, inputs)
    fail = [False]

    def explode(*args: Any) -> None:
        if fail and fail.pop():
            raise ZeroDivisionError

    inner = next(m for n, m in model.named_modules() if n.endswith("attention"))
    handle = inner.register_forward_pre_hook(explode)
    with torch.no_grad(), Editing(structure, gate_edits(structure, [Gate("mlp", (1, 2))])):
        wanted = model(**inputs)[0]
        fail.append(True)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        assert not torch.overrides._get_current_function_mode_stack()
        assert torch.equal(model(**inputs)[0], wanted)
    handle.remove()


@pytest.mark.parametrize("name", ["bert", "opt", "xlnet"])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_one_gate_for_each_sample(name: str, count: int) -> None:
    model, inputs = zoo.build(name)
    structure = find_structure(model, inputs)
    with pytest.raises(RcProbeError, match=f"{count} gates were given"):
        streams(structure, inputs, [Gate("attention", 2, value=torch.ones(count))])
