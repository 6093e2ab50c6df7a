"""The attention op: how it is owned, and its heads against zeroed weights."""

import copy
from typing import Any

import pytest
import torch
import transformers
from support import zoo
from support.attention import FEW, OUTPUT, attached, run
from support.random_models import randomise
from support.streams import PROVED, same, streams
from torch import Tensor

from rc_probe import Gate, RcProbeError
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits import attention_interface as interface
from rc_probe.hooks.edits.attention_patterns import patterns
from rc_probe.hooks.structure.example_inputs import with_no_cache
from rc_probe.models.structure_table import structure_rows

# Read off the modeling files: these make their patterns themselves, all others ask AttentionInterface.
INTERCEPTED = {
    "xlnet": "softmax", "xlnet_two_streams": "softmax", "deberta_v2": "softmax", "mpnet": "softmax",
    "gptj": "softmax", "bloom": "softmax", "bloom_post_norm": "softmax",
    "falcon": "scaled_dot_product_attention", "falcon_new": "scaled_dot_product_attention",
}  # fmt: skip


@torch.no_grad()
def zero_head(module: Any, head: int, heads: int = 4) -> None:
    """Zero the weights that read one head (from 0) of the attention's output."""
    if hasattr(module, "o") and isinstance(module.o, torch.nn.Parameter):
        module.o[:, head] = 0  # XLNet: (dim, heads, head dim)
        return
    weight = module.weight
    columns = weight.T if type(module).__name__ == "Conv1D" else weight
    width = columns.shape[1] // heads
    columns[:, head * width : (head + 1) * width] = 0


# ---- how it is owned


@pytest.mark.parametrize("name", PROVED)
def test_the_op_is_owned_by_the_interface_wherever_the_model_routes_through_it(name: str) -> None:
    model, _, structure = attached(name)
    wanted = INTERCEPTED.get(name, "interface")
    for block in structure.blocks:
        for branch in (b for b in block.branches if b.kind == "attention"):
            assert {op.via for op in branch.ops} == {wanted}
        assert block.routed == (wanted == "interface")
    rows = [row["attention_op"] for row in structure_rows(structure) if row["kind"] == "attention"]
    assert set(rows) == {wanted}
    assert all(row["attention_op"] is None for row in structure_rows(structure) if row["kind"] == "mlp")
    assert type(model.config._attn_implementation) is str


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "t5_encoder"])
def test_eager_models_are_owned_by_the_interface_too(name: str) -> None:
    model, inputs = zoo.build(name)
    model.set_attn_implementation("eager")
    ops = [op for block in find_structure(model, inputs).blocks for b in block.branches for op in b.ops]
    assert {op.via for op in ops} == {"interface"}


def test_attaching_by_the_interface_costs_no_further_pass() -> None:
    for name, passes in (("bert", 4), ("bloom", 4)):  # plain, taped, plain again, gates of 1
        model, inputs = zoo.build(name)
        calls = []
        model.register_forward_pre_hook(lambda *a, calls=calls: calls.append(1))
        find_structure(model, inputs)
        assert len(calls) == passes


@pytest.mark.parametrize("how", ["other numbers", "an error"])
def test_an_interface_that_is_not_bitwise_is_not_used(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*args: Any, **kwargs: Any) -> Any:
        if how == "an error":
            raise NotImplementedError
        out, weights = delegate(*args, **kwargs)
        return out * (1 + 1e-6), weights

    delegate = interface._attention
    monkeypatch.setattr(interface, "_attention", other)
    model, _, structure = attached("bert")
    ops = {op.via for block in structure.blocks for b in block.branches for op in b.ops}
    assert ops == {"scaled_dot_product_attention"}
    assert all(block.routed == 0 for block in structure.blocks)
    assert type(model.config._attn_implementation) is str


# ---- heads


@pytest.mark.parametrize("name", OUTPUT)
def test_a_head_off_is_its_slice_of_the_output_projection_zeroed(name: str) -> None:
    """Bitwise: what is left is summed in the same order."""
    model, inputs, structure = attached(name, padded=zoo.ZOO[name].modality == "text")
    weights, plain = copy.deepcopy(model.state_dict()), streams(structure, inputs)
    for head in (1, 2, 4) if name != "swin" else (1, 2):
        gated = streams(structure, inputs, [Gate("head", heads=(head,))])
        for path in dict.fromkeys(zoo.ZOO[name].paths):
            heads = 2 if name == "swin" and ".layers.0." in path else 4
            zero_head(model.get_submodule(f"{path}.{OUTPUT[name]}"), head - 1, heads)
        same(gated, streams(structure, inputs))
        assert not torch.equal(gated[1], plain[1])
        model.load_state_dict(weights)


@pytest.mark.parametrize("name", ["albert", "bert", "falcon"])
def test_a_head_of_one_block_is_off_in_that_call_only(name: str) -> None:
    model, inputs, structure = attached(name)
    plain = streams(structure, inputs)
    gated = streams(structure, inputs, [Gate("head", 2, heads=3)])
    same(gated[:2], plain[:2])
    assert not torch.equal(gated[2], plain[2])
    block = copy.deepcopy(structure.module(structure.blocks[1]))
    zero_head(block.get_submodule(OUTPUT[name]), 2)
    given: list[Any] = []
    with structure.module(structure.blocks[1]).register_forward_pre_hook(
        lambda module, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    ):
        run(model, with_no_cache(model, inputs))
    (_, *args), kwargs = given[1 if name == "albert" else 0]
    with torch.no_grad():
        out = block(plain[1], *args, **kwargs)
    assert torch.equal(gated[2], out if isinstance(out, Tensor) else out[0])


@pytest.mark.parametrize("name", FEW)
def test_heads_with_a_gate_for_each_sample(name: str) -> None:
    _, inputs, structure = attached(name)
    together = streams(structure, inputs, [Gate("head", 2, (1, 4), torch.tensor([0.0, 0.5]))])
    for sample, value in enumerate((0.0, 0.5)):
        alone = streams(structure, inputs, [Gate("head", 2, (1, 4), value)])
        same([x[sample] for x in together], [x[sample] for x in alone])
    same(
        streams(structure, inputs, [Gate("head", heads=(1, 2, 3, 4), value=1.0)]), streams(structure, inputs)
    )
    with pytest.raises(RcProbeError, match="3 gates were given for a batch of 2"):
        streams(structure, inputs, [Gate("head", 2, 1, torch.ones(3))])


@pytest.mark.parametrize("cls", ["T5", "Bart"])
def test_heads_and_patterns_of_a_decoder_with_cross_attention(cls: str) -> None:
    model, inputs = encoder_decoder(cls)
    structure = find_structure(model, inputs)
    assert structure.signature in ("A|X|M", "An|Xn|Mn")
    kinds: list[tuple[int, str, tuple[int, ...]]] = []
    plain = run(model, inputs)
    with patterns(structure, lambda b, branch, p: kinds.append((b.index, branch.kind, tuple(p.shape)))):
        assert torch.equal(run(model, inputs), plain)
    self_shape, cross_shape = (2, 4, 7, 7), (2, 4, 7, 9)
    assert kinds == [
        (i, k, s) for i in (0, 1) for k, s in (("attention", self_shape), ("cross", cross_shape))
    ]
    gated = streams(structure, inputs, [Gate("head", heads=(3,))])
    for block in structure.blocks:
        attention = "layer.0.SelfAttention.o" if cls == "T5" else "self_attn.out_proj"
        zero_head(structure.module(block).get_submodule(attention), 2)
    same(gated, streams(structure, inputs))


def encoder_decoder(cls: str) -> tuple[Any, Any]:
    if cls == "T5":
        config = transformers.T5Config(**zoo.ZOO["t5_encoder"].config | {"num_layers": 2})
    else:
        config = transformers.BartConfig(
            vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        )  # fmt: skip
    model = getattr(transformers, f"{cls}ForConditionalGeneration")(config).eval()
    randomise(model, torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 100, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return model, {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :7]}
