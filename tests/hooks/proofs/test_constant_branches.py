"""Blocks whose branches write nothing, or the same everywhere: grown into a model, or pruned."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import reference, zoo
from support.nets import Net
from support.streams import same, streams
from torch import Tensor, nn

import rc_probe
from rc_probe import Gate, RcProbeError
from rc_probe.hooks.attach import find_structure
from rc_probe.paths import decompose

BY_HAND = ["bert", "gpt2", "llama"]
WRITERS: dict[str, Callable[[Any, int], list[nn.Module]]] = {
    "bert": lambda m, i: [m.encoder.layer[i].attention.output.dense, m.encoder.layer[i].output.dense],
    "gpt2": lambda m, i: [m.h[i].attn.c_proj, m.h[i].mlp.c_proj],
    "llama": lambda m, i: [m.layers[i].self_attn.o_proj, m.layers[i].mlp.down_proj],
}


@torch.no_grad()
def silent(name: str, *blocks: int, only: int | None = None, bias: float = 0) -> tuple[Any, dict[str, Any]]:
    """A model whose blocks (from 0) write nothing, or one `bias`; `only` the attention (0) or the MLP (1) of them."""
    model, inputs = zoo.build(name)
    for block in blocks:
        for number, writer in enumerate(WRITERS[name](model, block)):
            if only in (None, number):
                for which, parameter in writer.named_parameters():
                    parameter.fill_(bias if which == "bias" else 0)
    return model, inputs


def by_hand(name: str, model: Any, inputs: dict[str, Any], **how: Any) -> list[Tensor]:
    return reference.streams(name, model.state_dict(), model.config, inputs, **how)


def residual(x: Tensor) -> float:
    """(tokens, dim): the token-uniformity residual in the composite norm, relative."""
    x = x.double()

    def norm(y: Tensor) -> Tensor:
        return (y.abs().sum(0).max() * y.abs().sum(1).max()).sqrt()

    return float(norm(x - x.mean(0)) / norm(x))


@pytest.mark.parametrize("name", BY_HAND)
def test_streams_and_curves_of_a_silent_block_by_hand(name: str) -> None:
    model, inputs = silent(name, 1)
    structure = find_structure(model, inputs)
    wanted = by_hand(name, model, inputs)
    same(streams(structure, inputs), wanted)
    if name != "bert":  # no norms on the stream
        assert torch.equal(wanted[2], wanted[1])
    with torch.no_grad(), rc_probe.attach(model, inputs=inputs, mask=None) as probe:
        model(**inputs)
    curve = probe.frame().query("metric == 'residual'")["mean"]
    for found, x in zip(curve, wanted, strict=True):
        assert found == pytest.approx(sum(map(residual, x)) / len(x), rel=1e-6)


@pytest.mark.parametrize("name", BY_HAND)
def test_kinds_and_heads_are_those_of_the_other_blocks(name: str) -> None:
    model, inputs = silent(name, 1)
    structure = find_structure(model, inputs)
    plain = find_structure(*zoo.build(name))
    assert structure.signature == plain.signature == {"bert": "An|Mn"}.get(name, "A|M")
    for block, like in zip(structure.blocks, plain.blocks, strict=True):
        assert [b.heads for b in block.branches] == [b.heads for b in like.branches] == [4, 0]
        assert [b.constant for b in block.branches] == [block.index == 1] * 2
        assert not any(b.constant for b in like.branches)
    assert structure.proved[:-1] == plain.proved
    assert structure.proved[-1].startswith("branches of blocks 2 (attention), 2 (mlp) add the same")


@pytest.mark.parametrize("part", ["attention", "mlp", "attention.skip", "mlp.skip", "head"])
@pytest.mark.parametrize("name", BY_HAND)
def test_gates_on_a_silent_block_by_hand(name: str, part: str) -> None:
    model, inputs = silent(name, 1)
    structure = find_structure(model, inputs)
    plain = by_hand(name, model, inputs)
    if part == "head":
        same(streams(structure, inputs, [Gate("head", 2, 1)]), plain)
        return
    found = streams(structure, inputs, [Gate(part, 2)])  # type: ignore[arg-type]
    same(found, by_hand(name, model, inputs, edits={2: {part: 0}}))
    if not part.endswith("skip"):
        same(found, plain)
    elif name != "bert":
        assert not found[-2].any()  # with a skip off, nothing is left


@pytest.mark.parametrize("only", [0, 1])
def test_gates_on_other_blocks_by_hand(only: int) -> None:
    for name in BY_HAND:
        model, inputs = silent(name, 0, only=only)
        structure = find_structure(model, inputs)
        assert [b.constant for b in structure.blocks[0].branches] == [only == 0, only == 1]
        for part in ("attention", "mlp"):
            found = streams(structure, inputs, [Gate(part, 3)])  # type: ignore[arg-type]
            same(found, by_hand(name, model, inputs, edits={3: {part: 0}}))


def test_each_branch_may_have_its_sibling_in_another_block() -> None:
    model, inputs = silent("gpt2", 0, 1, only=0)  # the attention of blocks 1 and 2, the MLPs of 2 and 3
    with torch.no_grad():
        for block in (1, 2):
            for parameter in WRITERS["gpt2"](model, block)[1].parameters():
                parameter.zero_()
    structure = find_structure(model, inputs)
    assert structure.signature == "A|M"
    assert [[b.constant for b in block.branches] for block in structure.blocks] == [
        [True, False], [True, True], [False, True]
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_bias_alone_is_constant_and_its_gate_takes_it_away(name: str) -> None:
    model, inputs = silent(name, 1, only=1, bias=0.25)
    structure = find_structure(model, inputs)
    assert [b.constant for b in structure.blocks[1].branches] == [False, True]
    plain = by_hand(name, model, inputs)
    same(streams(structure, inputs), plain)
    gone = streams(structure, inputs, [Gate("mlp", 2)])
    same(gone, by_hand(name, model, inputs, edits={2: {"mlp": 0}}))
    if name == "gpt2":
        assert torch.allclose(plain[2] - gone[2], torch.full_like(plain[2], 0.25), atol=1e-6)


def test_paths_through_a_silent_block_carry_nothing() -> None:
    model, inputs = silent("gpt2", 1)
    found = decompose(model, inputs)
    assert found.error < 1e-5
    assert not found.length(3).any()  # a path of length 3 goes through the attention of every block
    assert found.length(2).any()


@pytest.mark.parametrize("only", [None, 0, 1])
@pytest.mark.parametrize("name", BY_HAND)
def test_where_all_blocks_are_silent_nothing_tells_the_kind(name: str, only: int | None) -> None:
    model, inputs = silent(name, 0, 1, 2, only=only)
    with pytest.raises(RcProbeError) as caught:
        find_structure(model, inputs)
    said = str(caught.value)
    branch = {"bert": ("attention.output", "output"), "gpt2": ("attn", "mlp"), "llama": ("self_attn", "mlp")}[
        name
    ]
    assert "block 1" in said
    assert f"what its branch {branch[only or 0]}" in said
    assert "is the same for every token and input, and so it is in every block built alike" in said
    assert "whether it is attention or an MLP cannot be shown" in said
    assert "give trained weights" in said
    assert "\n" not in said


class Gated(nn.Module):
    """A block of the user's own that writes nothing where `on` is 0; `wide` adds a module to it."""

    def __init__(self, on: float, *, wide: bool = False) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm2, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.on = on
        if wide:
            self.more = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        heads = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.on * self.out(heads)
        return x + self.down(self.up(self.norm2(x)).relu())


def test_a_block_of_other_modules_is_no_sibling() -> None:
    inputs = {"input_ids": torch.arange(12).reshape(2, 6)}
    torch.manual_seed(0)
    assert find_structure(Net(Gated(1.0), Gated(0.0)).eval(), inputs).signature == "A|M"
    with pytest.raises(RcProbeError, match=r"block 2 .*so it is in every block built alike"):
        find_structure(Net(Gated(1.0, wide=True), Gated(0.0)).eval(), inputs)


class Elsewhere(Gated):
    """The last block adds what was computed from the first one's input: constant in what enters it, not in tokens."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if other is None:
            return super().forward(x)
        x = x + self.out(self.norm(other))
        return x + self.down(self.up(self.norm2(x)).relu())


class Crossed(Net):
    def forward(self, input_ids: Tensor) -> Tensor:
        x = first = self.embed(input_ids)
        for i, block in enumerate(self.blocks):
            x = block(x, first) if i == 2 else block(x)
        return x


def test_what_is_computed_from_elsewhere_is_not_taken_for_a_constant() -> None:
    inputs = {"input_ids": torch.arange(12).reshape(2, 6)}
    torch.manual_seed(0)
    model = Crossed(Elsewhere(1.0), Elsewhere(1.0), Elsewhere(1.0)).eval()
    with pytest.raises(RcProbeError, match="not computed from the stream that enters it, but from another"):
        find_structure(model, inputs)


def test_a_stream_of_one_number_everywhere_is_perturbed_all_the_same() -> None:
    model, inputs = zoo.build("gpt2")
    with torch.no_grad():
        model.wte.weight.fill_(0.0)
        model.wpe.weight.fill_(0.0)
    structure = find_structure(model, inputs)
    assert structure.signature == "A|M"
    assert not any(b.constant for block in structure.blocks for b in block.branches)
