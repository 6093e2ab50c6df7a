"""Attach finds and proves the structure of every family, and refuses what it cannot prove."""

from typing import Any

import pytest
import torch
from support import zoo
from support.odd_models import REFUSED, Odd, Plain, Stack, clip, t5
from support.random_models import randomise
from torch import Tensor, nn

import rc_probe
from rc_probe import RcProbeError
from rc_probe.hooks.attach import find_structure


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [n for n in zoo.ZOO if n not in REFUSED])
def test_families(name: str, padded: bool) -> None:
    family = zoo.ZOO[name]
    model, inputs = zoo.build(name, padded=padded and family.modality == "text")
    structure = find_structure(model, inputs)
    assert structure.signature == family.signature
    assert tuple(block.name for block in structure.blocks) == tuple(family.paths)
    assert len(structure.proved) == 5


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_proved_is_refused_with_the_place(name: str) -> None:
    model, inputs = zoo.build(name)
    with pytest.raises(RcProbeError, match=REFUSED[name]) as caught:
        find_structure(model, inputs)
    assert type(model).__name__ in str(caught.value)
    assert caught.value.todo


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "xlnet"])
def test_inputs_are_made_from_the_config_when_none_are_given(name: str) -> None:
    model, _ = zoo.build(name)
    assert find_structure(model).signature == zoo.ZOO[name].signature


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "gemma2", "gpt_neox"])
def test_half_and_double_precision(name: str, dtype: torch.dtype) -> None:
    model, inputs = zoo.build(name, dtype=dtype)
    assert find_structure(model, inputs).signature == zoo.ZOO[name].signature


def test_layouts() -> None:
    for name, axis in (("bert", 0), ("xlnet", 1), ("opt", 0)):
        model, inputs = zoo.build(name)
        assert [b.batch_axis for b in find_structure(model, inputs).blocks] == [axis] * len(
            zoo.ZOO[name].paths
        )


def test_shared_module_is_one_block_for_each_call() -> None:
    model, inputs = zoo.build("albert")
    blocks = find_structure(model, inputs).blocks
    assert len({b.name for b in blocks}) == 1
    assert [b.turn for b in blocks] == [0, 1, 2]


def test_decoder_of_an_encoder_decoder() -> None:
    import transformers

    config = transformers.T5Config(d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=64, vocab_size=100)
    model = transformers.T5ForConditionalGeneration(config).eval()
    randomise(model, torch.float32)
    assert find_structure(model).signature == "A|X|M"


def test_attaching_runs_once_for_a_model_and_form_of_input(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = zoo.build("bert")
    first = find_structure(model, inputs)
    calls = []
    model.register_forward_pre_hook(lambda *a: calls.append(1))
    assert find_structure(model, inputs) is first
    assert not calls
    find_structure(model, {"input_ids": inputs["input_ids"]})
    assert calls


def test_cost_of_attaching_is_under_ten_forward_passes() -> None:
    """Counted in block calls, the measure that does not depend on the machine."""
    model, inputs = zoo.build("bert")
    calls = [0]
    for layer in model.encoder.layer:
        layer.register_forward_pre_hook(lambda *a: calls.__setitem__(0, calls[0] + 1))
    find_structure(model, inputs)
    assert calls[0] < 10 * len(model.encoder.layer)


def hostile(how: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(1)
    return Stack(how).eval(), {"input_ids": torch.randint(20, (2, 7))}


@pytest.mark.parametrize(
    "how", ["add", "sum", "in place", "in place of the branch", "in place, returned by name", "out"]
)
def test_ways_to_write_the_same_sum(how: str) -> None:
    model, inputs = hostile(how)
    assert find_structure(model, inputs).signature == "A|M"


@pytest.mark.parametrize(
    "how", ["sub", "lerp", "stack", "addcmul", "highway", "third path", "alpha", "shift by a number"]
)
def test_sums_that_cannot_be_gated_are_refused(how: str) -> None:
    model, inputs = hostile(how)
    with pytest.raises(RcProbeError):
        find_structure(model, inputs)


def test_random_models_are_refused() -> None:
    model, inputs = hostile("add")
    model.register_forward_hook(lambda m, a, out: out + torch.rand(()))
    before = torch.get_rng_state()
    with pytest.raises(RcProbeError, match="changes from run to run"):
        find_structure(model, inputs)
    assert torch.equal(torch.get_rng_state(), before)


class Reversible(nn.Module):
    """Two streams, each added to from the other (Reformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(Couple() for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        a = b = self.embed(input_ids)
        for block in self.blocks:
            a, b = block(a, b)
        return b


class Couple(Plain):
    def __init__(self) -> None:
        super().__init__("add")

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a = a + self.attention(self.norm1(b))
        return a, b + self.down(self.up(self.norm2(a)).relu())


def test_reversible_streams_are_refused() -> None:
    torch.manual_seed(1)
    with pytest.raises(RcProbeError, match="a second stream"):
        find_structure(Reversible().eval(), {"input_ids": torch.randint(20, (2, 7))})


def odd(how: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(1)
    model = Stack("add")
    model.blocks = nn.ModuleList(Odd(how) for _ in range(3))
    return model.eval(), {"input_ids": torch.randint(20, (2, 7))}


@pytest.mark.parametrize(
    "how", ["plain", "tokens before heads", "heads before batch", "forward only", "router"]
)
def test_kinds_do_not_depend_on_the_layout(how: str) -> None:
    model, inputs = odd(how)
    assert find_structure(model, inputs).signature == "A|M"


@pytest.mark.parametrize("how", ["tokens before heads", "heads before batch"])
def test_heads_of_an_unproved_layout_are_not_gated(how: str) -> None:
    model, inputs = odd(how)
    with pytest.raises(RcProbeError, match="cannot be told apart"):
        rc_probe.ablate(model, "head@2:1", inputs=inputs)
    rc_probe.ablate(odd("plain")[0], "head@2:2", inputs=inputs)


class AddNorm(nn.LayerNorm):
    """The add of the skip inside the norm's module."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x if residual is None else x + residual)


class Fused(Plain):
    def __init__(self) -> None:
        super().__init__("add")
        self.norm1, self.norm2 = AddNorm(16), AddNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.attention(x), x)
        return self.norm2(self.down(self.up(x).relu()), x)


def test_a_norm_that_holds_the_add_is_not_left_out() -> None:
    torch.manual_seed(1)
    model = Stack("add")
    model.blocks = nn.ModuleList(Fused() for _ in range(3))
    inputs = {"input_ids": torch.randint(20, (2, 7))}
    assert find_structure(model.eval(), inputs).signature == "An|Mn"
    with pytest.raises(RcProbeError, match="cannot be left out"):
        rc_probe.ablate(model, "mlp.sublayer", inputs=inputs)


def test_a_changed_model_is_attached_anew() -> None:
    model, inputs = hostile("add")
    assert find_structure(model, inputs).depth == 3
    model.blocks = model.blocks[:2]
    assert find_structure(model, inputs).depth == 2


def test_as_many_tokens_as_samples_can_still_be_told_apart_or_it_says_so() -> None:
    model, _ = zoo.build("xlnet")
    for length in (2, 3, 5):
        ids = torch.randint(10, 100, (length, length))
        try:
            axes = {block.batch_axis for block in find_structure(model, {"input_ids": ids}).blocks}
        except RcProbeError as error:
            assert "cannot be told apart" in str(error)
        else:
            assert axes == {1}


def test_a_forward_pass_that_fails_is_one_clear_error() -> None:
    model, _ = zoo.build("bert")
    with pytest.raises(RcProbeError, match="its forward pass fails"):
        find_structure(model, {"input_ids": torch.full((2, 5), 10_000)})


def test_every_stack_is_found_and_one_is_picked_by_name() -> None:
    model = t5()
    decoder, encoder = find_structure(model), find_structure(model, stack="encoder")
    assert (decoder.name, decoder.signature, decoder.others) == ("decoder.block", "A|X|M", ("encoder.block",))
    assert (encoder.name, encoder.signature, encoder.others) == ("encoder.block", "A|M", ("decoder.block",))


def test_towers() -> None:
    model, inputs = clip()
    vision = find_structure(model, inputs, stack="vision")
    assert (vision.name, vision.depth, vision.signature) == ("vision_model.encoder.layers", 3, "A|M")
    text = find_structure(model, inputs, stack="text_model.encoder.layers")
    assert (text.depth, text.signature) == (2, "A|M")


@pytest.mark.parametrize("stack", ["audio", "model.encoder.layers"])
def test_a_stack_that_is_not_there_or_not_the_only_one(stack: str) -> None:
    model, inputs = clip()
    with pytest.raises(RcProbeError, match=r"Its stacks are .*vision_model\.encoder\.layers"):
        find_structure(model, inputs, stack=stack)


def test_blocks_named_by_hand() -> None:
    model, inputs = zoo.build("bert")
    named = find_structure(model, inputs, blocks="encoder.layer.*")
    assert named.blocks == find_structure(model, inputs).blocks
    assert named.others == ()


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("encoder.blocks.*", "no module of this name ran"),
        ("encoder.layer.*.attention.self", "no add"),
        ("encoder.layer.*.attention", "3 adds outside of these blocks"),  # the MLPs
        ("encoder.layer.[01]", "2 adds outside of these blocks"),
    ],
)
def test_blocks_named_wrongly(pattern: str, what: str) -> None:
    model, inputs = zoo.build("bert")
    with pytest.raises(RcProbeError, match=what):
        find_structure(model, inputs, blocks=pattern)


class Tail(Plain):
    """Another class than the blocks before it: not their next stage."""


def test_a_stack_that_cannot_be_proved_leaves_the_others() -> None:
    """The last stack is refused; the one before it is measured, and it says why."""
    torch.manual_seed(1)
    model = Stack("add")
    model.blocks.append(nn.Sequential(nn.Linear(16, 16), *(Tail("shift by a number") for _ in range(2))))
    structure = find_structure(model.eval(), {"input_ids": torch.randint(20, (2, 7))})
    assert (structure.name, structure.depth) == ("blocks", 3)
    assert "the identity" in structure.refused[0] or "a path was missed" in structure.refused[0]


class Nested(Plain):
    """Two residual MLPs inside the MLP branch."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        for _ in range(2):
            y = y + self.down(self.up(y).relu())
        return x + self.hidden(y)


def test_skips_inside_a_branch_are_said_to_stay() -> None:
    torch.manual_seed(1)
    model = Stack("add")
    inputs = {"input_ids": torch.randint(20, (2, 7))}
    assert len(find_structure(model, inputs).proved) == 5
    model.blocks = nn.ModuleList(Nested("add") for _ in range(3))
    structure = find_structure(model.eval(), inputs)
    assert structure.signature == "A|M"
    assert [[b.inner for b in block.branches] for block in structure.blocks] == [[0, 2]] * 3
    assert "outermost level: inside mlp branches" in structure.proved[-1]


class Feature(nn.Module):
    """x + pointwise map of a norm of x, on a stream (batch, features, height, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.mix(x).movedim(1, -1)).relu()).movedim(-1, 1)


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(Feature(w), Feature(w)) for w in (8, 12))
        self.between = nn.Conv2d(8, 12, 2, 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.stages[1](self.between(self.stages[0](pixel_values)))


def test_streams_with_features_first() -> None:
    torch.manual_seed(1)
    model = Pyramid().eval()
    structure = find_structure(model, {"pixel_values": torch.randn(2, 8, 20, 20)})
    assert structure.signature == "C"
    assert [(b.feature_axis, b.dim) for b in structure.blocks] == [(1, 8)] * 2 + [(1, 12)] * 2
    x = torch.randn(1, 8, 20, 20)
    inputs = {"pixel_values": torch.randn(2, 8, 20, 20)}
    with (
        rc_probe.attach(model, metrics=["residual_frobenius"], inputs=inputs, mask=None) as probe,
        torch.no_grad(),
    ):
        y = model(x)
    measured = probe.frame().set_index("layer")["mean"]
    for layer, stream in ((0, x), (4, y)):
        X = stream[0].flatten(1).T.double()  # (height × width, features)
        by_hand = torch.linalg.norm(X - X.mean(0)) / torch.linalg.norm(X)
        assert measured[layer] == pytest.approx(float(by_hand), rel=1e-6)


@pytest.mark.parametrize("size", [32, 24])  # as wide as the MLP of the first, or as the second has features
def test_features_that_cannot_be_told_from_the_width_refuse_the_whole_stack(size: int) -> None:
    torch.manual_seed(1)
    with pytest.raises(RcProbeError, match="which one are the features"):
        find_structure(Pyramid().eval(), {"pixel_values": torch.randn(2, 8, size, size)})
