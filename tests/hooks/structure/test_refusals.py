"""Models without a stack of blocks that can be read: the refusal says what stands in the way."""

from typing import Any

import pytest
import torch
from support import zoo
from support.nets import Net
from support.odd_models import Plain
from support.random_models import make, randomise
from torch import Tensor, nn

import rc_probe
from rc_probe.hooks.attach import find_structure

INPUTS = {"input_ids": torch.arange(14).reshape(2, 7)}


def refusal(model: nn.Module, inputs: dict[str, Any] | None = None, **chosen: Any) -> str:
    with pytest.raises(rc_probe.RcProbeError) as caught:
        find_structure(model.eval(), INPUTS if inputs is None else inputs, **chosen)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Lists(nn.Module):
    """The layers' parts lie in lists of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.attentions = nn.ModuleList(Attention() for _ in range(3))
        self.ffns = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(3)
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for attention, ffn in zip(self.attentions, self.ffns, strict=True):
            x = x + nn.functional.dropout(attention(x), 0.1, self.training)
            x = x + ffn(x)
        return x


class Attention(Plain):
    def __init__(self) -> None:
        super().__init__("plain")

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.norm1(x))


def test_parts_in_lists_of_their_own() -> None:
    said = refusal(Lists())
    assert said.startswith(
        "Lists: its blocks are no modules: Lists itself adds to the stream what the modules in attentions and in ffns return. "
    )
    assert "Give each block a module of its own that takes the stream and returns it" in said
    hint = refusal(Lists(), blocks="attentions.*")
    assert (
        "no add of the stream was found in attentions.0, attentions.1, attentions.2: its blocks are no modules"
        in hint
    )


class PastHooks(Net):
    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block.forward(x)
        return x


def test_blocks_run_by_their_forward_method() -> None:
    assert find_structure(Net(*(Plain("plain") for _ in range(3))).eval(), INPUTS).signature == "A|M"
    said = refusal(PastHooks(*(Plain("plain") for _ in range(3))))
    assert "it runs its blocks (blocks.*) by their `forward` method, past all hooks" in said


class Cut(Plain):
    """The first token goes its own way through a block, and the stream is put together from parts."""

    def forward(self, x: Tensor) -> Tensor:
        others = x[:, 1:] + self.attention(self.norm1(x[:, 1:]))
        x = torch.cat([x[:, :1] * self.norm1(x[:, :1]), others], 1)
        return x + self.down(self.up(self.norm2(x)).relu())


def test_a_stream_that_is_put_together_anew_in_every_block() -> None:
    said = refusal(Net(*(Cut("plain") for _ in range(3))))
    assert "hand on no stream as it is" in said
    assert "is put together from parts anew by `cat` in blocks.2" in said
    assert "does not look like a transformer" not in said


class Convolutions(Net):
    def __init__(self) -> None:
        super().__init__(*(nn.Linear(16, 16) for _ in range(3)))


def test_what_has_neither_attention_nor_skips_does_not_look_like_a_transformer() -> None:
    said = refusal(Convolutions())
    assert "no attention was found in it, and no residual adds: this does not look like a transformer" in said


class Wider(Plain):
    def __init__(self, width: int, to: int) -> None:
        super().__init__("plain", to)
        self.proj = nn.Identity() if to == width else nn.Linear(width, to)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.proj(x))


def test_a_stream_that_changes_its_width_inside_a_block() -> None:
    said = refusal(Net(Wider(16, 32), Wider(32, 32), Wider(32, 32)))
    assert "does not enter the block as one of its tensors: it is made anew by `linear`" in said
    assert "where its width changes to 32" in said


# ---- families that were refused, and are proved


def small(name: str, config: Any, **inputs: Tensor) -> tuple[Any, dict[str, Tensor]]:
    import transformers

    model = make(getattr(transformers, name), config, torch.float32)
    randomise(model, torch.float32)
    return model, inputs


def ibert() -> tuple[Any, dict[str, Tensor]]:
    import transformers

    return small(
        "IBertModel", transformers.IBertConfig(**zoo.BERT), input_ids=torch.arange(10, 30).reshape(2, 10)
    )


def vitdet(**more: Any) -> tuple[Any, dict[str, Tensor]]:
    import transformers

    config = transformers.VitDetConfig(**zoo.VIT | {"pretrain_image_size": 32, "mlp_ratio": 2} | more)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return small("VitDetModel", config, pixel_values=pixels)


@torch.no_grad()
def left(model: Any, modules: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What leaves each block, by plain hooks; (batch, tokens, dim)."""
    found: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda _m, _a, out: found.append(out)) for m in modules]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    first = [x if isinstance(x, Tensor) else x[0] for x in found]
    first = [x if isinstance(x, Tensor) else x[0] for x in first]
    return [x.flatten(2).transpose(1, 2) if x.ndim == 4 else x for x in first]


@pytest.mark.parametrize("made", [ibert, vitdet])
def test_streams_and_ablations_are_those_of_zeroed_maps(made: Any) -> None:
    from support.streams import same, streams

    model, inputs = made()
    structure = find_structure(model, inputs)
    assert structure.signature == ("An|Mn" if made is ibert else "A|M")
    layers = list(model.encoder.layer)
    same(streams(structure, inputs)[1:], left(model, layers, inputs))
    for part in ("attention", "mlp"):
        gone = streams(structure, inputs, [rc_probe.Gate(part, 2)])[1:]
        again, _ = made()
        layer = again.encoder.layer[1]
        if made is ibert:
            writer = layer.attention.output.dense if part == "attention" else layer.output.dense
        else:
            writer = layer.attention.proj if part == "attention" else layer.mlp.fc2
        with torch.no_grad():
            for parameter in writer.parameters():
                parameter.zero_()
        wanted = left(again, list(again.encoder.layer), inputs)
        for x, y in zip(gone, wanted, strict=True):
            assert torch.equal(x, y)
        assert not torch.equal(gone[-1], streams(structure, inputs)[-1])


def minimax(alpha: float) -> tuple[Any, dict[str, Tensor]]:
    """Real checkpoints have alpha 3.56: skips carry the normed stream times that."""
    import transformers

    config = transformers.MiniMaxConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, num_local_experts=2, block_size=4, full_attn_alpha_factor=alpha,
        layer_types=["full_attention", "linear_attention", "full_attention"], linear_attn_alpha_factor=alpha,
        mlp_alpha_factor=alpha,
    )  # fmt: skip
    return small("MiniMaxModel", config, input_ids=torch.arange(10, 30).reshape(2, 10))


def rwkv() -> tuple[Any, dict[str, Tensor]]:
    import transformers

    config = transformers.RwkvConfig(vocab_size=40, hidden_size=16, num_hidden_layers=3, context_length=32)
    return small("RwkvModel", config, input_ids=torch.arange(10, 30).reshape(2, 10))


@pytest.mark.parametrize(
    ("made", "signature", "blocks", "writers"),
    [
        (lambda: minimax(1.0), "An|M", "layers", {"attention": "self_attn.out_proj"}),
        (lambda: minimax(3.56), "An|M", "layers", {"attention": "self_attn.out_proj"}),
        (rwkv, "C|C", "blocks", {"mixer": "attention.output feed_forward.value"}),
        (lambda: zoo.build("bloom_post_norm"), "An|M", "h", {"attention": "self_attention.dense", "mlp": "mlp.dense_4h_to_h"}),
    ],
    ids=["minimax", "minimax, scaled skips", "rwkv", "bloom"],
)  # fmt: skip
def test_a_stream_that_goes_through_a_norm_before_the_first_add(
    made: Any, signature: str, blocks: str, writers: dict[str, str]
) -> None:
    from support.streams import same, streams

    model, inputs = made()
    structure = find_structure(model, inputs)
    assert structure.signature == signature and structure.blocks[0].norms
    same(streams(structure, inputs)[1:], left(model, getattr(model, blocks), inputs))
    for part, names in writers.items():
        gone = streams(structure, inputs, [rc_probe.Gate(part, 2)])[1:]
        again, _ = made()
        with torch.no_grad():
            for name in names.split():
                for parameter in getattr(again, blocks)[1].get_submodule(name).parameters():
                    parameter.zero_()
        for x, y in zip(gone, left(again, getattr(again, blocks), inputs), strict=True):
            assert torch.allclose(x, y, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(gone[-1], streams(structure, inputs)[-1], atol=1e-3)
