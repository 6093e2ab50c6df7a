"""Passes that begin at their first edit: bit by bit the full passes, with fewer modules called."""

from typing import Any

import pytest
import torch
from support import zoo
from torch import Tensor, nn

from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.components import COMPONENTS
from rc_probe.hooks.edits.edits import Edits
from rc_probe.hooks.edits.gates import Gate, gate_edits, has_component
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.edits.passes import Passes
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.proofs.shortcuts import same
from rc_probe.hooks.structure.structure import Structure

FAMILIES = [
    "bert_mlm", "bert_classifier", "albert_groups", "gpt2_lm", "llama", "gemma2", "gpt_neox", "gptj", "falcon", "t5_encoder",
    "opt_post_norm", "mixtral", "swin", "vit_classifier", "xlnet", "deberta_v2", "modernbert",
]  # fmt: skip


def attached(name: str) -> tuple[Any, dict[str, Tensor], Structure]:
    model, inputs = zoo.build(name)
    return model, inputs, find_structure(model, inputs)


def edits_of(structure: Structure, batch: int) -> dict[str, Edits]:
    """Every component of every block alone, several blocks, heads, and gates per sample."""
    wanted = [
        Gate(c, (b.index + 1,))
        for b in structure.blocks
        for c in COMPONENTS
        if c != "head" and has_component(b, c)
    ]
    wanted += [Gate("head", (b.index + 1,), (1,)) for b in structure.blocks]
    last = (structure.depth - 1, structure.depth)
    wanted += [Gate("attention", last), Gate("mlp", last, (), 0.5), Gate("block", last)]
    wanted += [Gate("mlp", (2,), (), torch.linspace(0, 1, batch))]
    found = {}
    for gate in wanted:
        try:
            found[str(gate)] = gate_edits(structure, [gate])
        except RcProbeError:  # no heads that can be gated, no MLP
            continue
    return found


def read(passes: Passes, edits: Edits) -> tuple[Any, dict[int, Tensor]]:
    streams: dict[int, Tensor] = {}
    return passes.edited(edits, lambda layer, x: streams.update({layer: x.clone()})), streams


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pass_that_begins_at_its_edits_is_the_full_pass_bit_by_bit(name: str) -> None:
    model, inputs, structure = attached(name)
    batch = next(iter(inputs.values())).shape[0]
    edits = edits_of(structure, batch)
    with measuring(model):
        short = Passes(structure, inputs, edits.values(), proving=True)
        plain = model(**short.inputs)
        assert same(short.plain(), plain)
        for label, each in edits.items():
            output, streams = read(short, each)
            full, whole = read(Passes(structure, inputs, shortcuts=False), each)
            assert same(output, full), label
            assert streams.keys() == whole.keys() == set(range(min(each.blocks) + 1, structure.depth + 1)), (
                label
            )
            assert all(torch.equal(x, whole[layer]) for layer, x in streams.items()), label
        assert same(model(**short.inputs), plain)
    assert not any("_compiled_call_impl" in vars(m) or m._forward_hooks for m in model.modules())


def called(model: Any) -> tuple[list[str], list[Any]]:
    """The names of the modules whose forward runs from now on, and what takes the listeners away."""
    names: list[str] = []
    for name, module in model.named_modules():
        own = module.forward

        def heard(*args: Any, _own: Any = own, _name: str = name, **kwargs: Any) -> Any:
            names.append(_name)
            return _own(*args, **kwargs)

        module.forward = heard
    return names, [vars(m).pop for m in model.modules()]


def called_by(model: nn.Module, structure: Structure, inputs: dict[str, Any], edits: Edits) -> list[str]:
    """Names of the modules that an edited pass calls, which gives what a whole one gives, bitwise."""
    with measuring(model):
        passes = Passes(structure, inputs, [edits])
        passes.plain()
        names, remove = called(model)
        output = passes.edited(edits)
        for pop in remove:
            pop("forward", None)
        assert same(output, Passes(structure, inputs, shortcuts=False).edited(edits))
    return names


def test_what_is_removed_and_what_comes_before_is_not_called() -> None:
    model, inputs, structure = attached("bert_mlm")
    edits = gate_edits(structure, [Gate("mlp", (3,))])
    with measuring(model):
        passes = Passes(structure, inputs, [edits])
        passes.plain()
        names, remove = called(model)
        passes.edited(edits)
    for pop in remove:
        pop("forward", None)
    layers = {name.split("layer.")[1].partition(".")[0] for name in names if "layer." in name}
    assert layers == {"2"}  # counted from 0
    assert not any("embeddings" in name for name in names)
    assert not any("attention" in name for name in names)  # done before the edit
    assert not any("intermediate" in name or name.endswith("layer.2.output.dense") for name in names)
    assert "bert.encoder.layer.2.output.LayerNorm" in names


HEAVY = {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"}


@pytest.mark.parametrize(
    ("gate", "runs"),
    [
        (Gate("mlp", 2, (), 0.5), set()),  # its branches are done before the add
        (Gate("mlp.skip", 2), set()),
        (Gate("attention", 2, (), 0.5), {"c_fc", "mlp.c_proj"}),
        (Gate("attention.skip", 2), {"c_fc", "mlp.c_proj"}),
        (Gate("head", 2, 1), HEAVY),  # an edit inside the attention
        (Gate("mlp", (2, 3), (), 0.5), set()),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set | frozenset) else str(value),
)
def test_modules_done_before_the_first_edit_of_a_block_are_not_called(gate: Gate, runs: set[str]) -> None:
    model, inputs, structure = attached("gpt2_lm")
    edits = gate_edits(structure, [gate])
    names = called_by(model, structure, inputs, edits)
    for number, expected in ((0, set()), (1, runs), (2, HEAVY)):
        inside = [name for name in names if f".h.{number}." in name]
        assert {end for end in HEAVY if any(name.endswith(end) for name in inside)} == expected


class Writes(nn.Module):
    """Gives one thing, and changes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1.5)
        return self.inner(x)


class WritingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.writes = nn.LayerNorm(16), Writes()
        self.qkv, self.up = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        extra = self.writes(normed)
        q, k, v = self.qkv(normed + extra.tanh()).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.up(x).tanh()


def test_a_module_that_writes_into_what_it_was_given_is_called() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(WritingBlock() for _ in range(3))).eval()
    inputs = {"input": torch.randn(2, 5, 16)}
    structure = find_structure(model, inputs)
    closed = {call.name: call.closed for call in structure.blocks[1].flow.calls}
    assert closed == {"1.norm": True, "1.writes": False, "1.writes.inner": True, "1.qkv": True, "1.up": True}
    edits = gate_edits(structure, [Gate("mlp.skip", 2)])
    with measuring(model):
        passes = Passes(structure, inputs, [edits])
        passes.plain()
        names, remove = called(model)
        output = passes.edited(edits)
        for pop in remove:
            pop("forward", None)
        assert {name for name in names if name.startswith("1.")} == {"1.writes"}
        assert same(output, Passes(structure, inputs, shortcuts=False).edited(edits))


def test_the_whole_block_left_out_calls_nothing_heavy_in_it() -> None:
    model, inputs, structure = attached("llama")
    edits = gate_edits(structure, [Gate("block", (3,))])
    with measuring(model):
        passes = Passes(structure, inputs, [edits])
        passes.plain()
        names, remove = called(model)
        output = passes.edited(edits)
    for pop in remove:
        pop("forward", None)
    assert [name for name in names if "layers.2." in name] == []
    with measuring(model):
        kept, model.layers = model.layers, model.layers[:2]
        assert torch.equal(output.last_hidden_state, model(**inputs, use_cache=False).last_hidden_state)
        model.layers = kept


def test_somebody_who_listens_inside_a_removed_branch_is_not_passed_over() -> None:
    model, inputs, structure = attached("gpt2_lm")
    edits = gate_edits(structure, [Gate("mlp", (2,))])
    seen: list[Any] = []
    handle = model.transformer.h[1].mlp.c_proj.register_forward_hook(lambda *_: seen.append(1))
    with measuring(model):
        passes = Passes(structure, inputs, [edits])
        passes.plain()
        passes.edited(edits)
    handle.remove()
    assert len(seen) == 2


def test_the_hooks_of_the_user_on_a_block_act_once() -> None:
    model, inputs, structure = attached("gpt2_lm")
    edits = gate_edits(structure, [Gate("mlp", (3,))])
    handle = model.transformer.h[0].register_forward_hook(
        lambda m, a, o: (o[0] + 1, *o[1:]) if isinstance(o, tuple) else o + 1
    )
    with measuring(model):
        passes = Passes(structure, inputs, [edits])
        passes.plain()
        output = passes.edited(edits)
        assert same(output, Passes(structure, inputs, shortcuts=False).edited(edits))
    handle.remove()


def test_recordings_stop_at_their_limit() -> None:
    model, inputs, structure = attached("bert_mlm")
    edits = gate_edits(structure, [Gate("attention", (3,))])
    stream = next(iter(inputs.values())).numel() * 32 * 4  # bytes of one block's output
    with measuring(model):
        passes = Passes(structure, inputs, [edits], limit=stream)
        passes.plain()
        assert passes.first(edits) == len(passes.recorded) == 1
        assert same(passes.edited(edits), Passes(structure, inputs, shortcuts=False).edited(edits))


def test_edits_that_hold_in_every_pass() -> None:
    model, inputs, structure = attached("gpt2_lm")
    base, more = (gate_edits(structure, [Gate("mlp", (number,))]) for number in (1, 3))
    with measuring(model):
        passes = Passes(structure, inputs, [more], base=base)
        plain = passes.plain()
        assert same(plain, Passes(structure, inputs, shortcuts=False).edited(base))
        assert passes.first(more) == 2
        assert same(passes.edited(more), Passes(structure, inputs, shortcuts=False).edited(base.then(more)))


def test_the_encoder_of_a_decoder_runs_once() -> None:
    from support.odd_models import t5

    model = t5()
    inputs = {
        "input_ids": torch.arange(10, 20).reshape(2, 5),
        "decoder_input_ids": torch.arange(20, 28).reshape(2, 4),
    }
    structure = find_structure(model, inputs)
    edits = gate_edits(structure, [Gate("cross", (2,))])
    names = called_by(model, structure, inputs, edits)
    assert not any(name.startswith("encoder") for name in names)
