"""Frozen passes of real models: exact, by hand, refused where they cannot be, and gone without a trace."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import zoo
from support.untouched import same, state
from torch import Tensor, nn

from rc_probe import paths
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.model_head import ModelHead
from rc_probe.hooks.errors import RcProbeError

EXACT = [
    "bert", "albert", "albert_groups", "electra", "deberta_v2", "mpnet", "modernbert", "gpt2", "opt", "opt_post_norm",
    "gpt_neox", "gpt_neox_sequential", "gptj", "bloom", "falcon", "falcon_new", "phi", "xlnet", "vit", "dinov2", "beit",
    "clip_vision", "swin", "t5_encoder", "bert_mlm", "gpt2_lm", "vit_classifier",
]  # fmt: skip
FLOAT32_NORMS = ["llama", "mistral", "qwen3", "olmo2", "mixtral"]  # cast whatever the model is in


def hidden_state(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What the library calls the last hidden state, computed by the model itself."""
    base = getattr(model, "base_model", model)
    with torch.no_grad():
        found: Tensor = base(**inputs).last_hidden_state
    return found


def distance(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", EXACT)
def test_the_parts_add_up_to_the_models_own_output(name: str) -> None:
    model, inputs = zoo.build(name, dtype=torch.float64, batch=3, length=7, padded=True)
    found = paths.decompose(model, inputs)
    assert distance(found.total(), hidden_state(model, inputs)) < 1e-12
    assert found.error < 1e-12
    assert distance(found.stream.sum(0), found.stream_value) < 1e-12
    lengths = sum(found.length(k) for k in range(found.most + 1))
    assert distance(lengths + found.bias, found.value) < 1e-12


@pytest.mark.parametrize("name", [*FLOAT32_NORMS, "gemma2"])
def test_norms_that_compute_in_float32(name: str) -> None:
    dtype = torch.float64 if torch.float64 in zoo.ZOO[name].dtypes else torch.float32
    model, inputs = zoo.build(name, dtype=dtype, padded=True)
    found = paths.decompose(model, inputs)
    assert distance(found.total(), hidden_state(model, inputs)) < 2e-6
    assert found.error < 2e-6


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "llama", "mixtral", "deberta_v2", "swin", "xlnet"])
def test_in_float32(name: str) -> None:
    model, inputs = zoo.build(name, padded=True)
    found = paths.decompose(model, inputs)
    assert distance(found.total(), hidden_state(model, inputs)) < 1e-5
    assert 0 < found.error < 1e-5


def test_the_layout_of_a_model_that_counts_tokens_first() -> None:
    # XLNet's stream is (tokens, batch, dim), here with as many of the one as of the other.
    model, inputs = zoo.build("xlnet", dtype=torch.float64, batch=4, length=4)
    assert distance(paths.decompose(model, inputs).total(), hidden_state(model, inputs)) < 1e-12


# ---- by hand

Channels = dict[int | None, Tensor]  # by length; None is what comes from biases


def linear(channels: Channels, layer: Any, weight: Tensor | None = None) -> Channels:
    """Every channel times the weight, the bias to the channel of biases."""
    weight = layer.weight if weight is None else weight
    out = {k: x @ weight.T for k, x in channels.items()}
    out[None] = out[None] + layer.bias
    return out


def norm(channels: Channels, layer: nn.LayerNorm) -> Channels:
    value = sum(channels.values())
    scale = 1 / (value.var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
    out = {k: (x - x.mean(-1, keepdim=True)) * scale * layer.weight for k, x in channels.items()}
    out[None] = out[None] + layer.bias
    return out


def activated(channels: Channels, act: Any) -> Channels:
    value = sum(channels.values())
    return {k: x * act(value) / value for k, x in channels.items()}


def added(a: Channels, b: Channels) -> Channels:
    zero = torch.zeros_like(a[None])
    return {k: a.get(k, zero) + b.get(k, zero) for k in {*a, *b}}


def attended(values: Channels, q: Tensor, k: Tensor, heads: int, causal: bool) -> Channels:
    """Values (B, T, heads · d) through the patterns of q and k, one hop longer."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    scores = split(q) @ split(k).mT / (q.shape[-1] // heads) ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    pattern = torch.exp(scores - scores.logsumexp(-1, keepdim=True))
    out = {n: (pattern @ split(x)).transpose(1, 2).flatten(2) for n, x in values.items()}
    return {n if n is None else n + 1: x for n, x in out.items()}


def bert_by_hand(model: Any, inputs: dict[str, Tensor], act: Any) -> Channels:
    embedded = model.embeddings(inputs["input_ids"], inputs["token_type_ids"])
    x: Channels = {None: torch.zeros_like(embedded), 0: embedded}
    for layer in model.encoder.layer:
        own = layer.attention.self
        value = sum(x.values())
        mixed = attended(linear(x, own.value), own.query(value), own.key(value), 4, causal=False)
        out = linear(mixed, layer.attention.output.dense)
        x = norm(added(out, x), layer.attention.output.LayerNorm)
        wide = activated(linear(x, layer.intermediate.dense), act)
        x = norm(added(linear(wide, layer.output.dense), x), layer.output.LayerNorm)
    return x


def gpt2_by_hand(model: Any, inputs: dict[str, Tensor], act: Any) -> Channels:
    ids = inputs["input_ids"]
    embedded = model.wte(ids) + model.wpe(torch.arange(ids.shape[1]))
    x: Channels = {None: torch.zeros_like(embedded), 0: embedded}
    for block in model.h:
        qkv = linear(norm(x, block.ln_1), block.attn.c_attn, block.attn.c_attn.weight.T)
        q, k, _ = sum(qkv.values()).chunk(3, -1)
        values = {n: y.chunk(3, -1)[2] for n, y in qkv.items()}
        mixed = attended(values, q, k, 4, causal=True)
        x = added(x, linear(mixed, block.attn.c_proj, block.attn.c_proj.weight.T))
        wide = activated(linear(norm(x, block.ln_2), block.mlp.c_fc, block.mlp.c_fc.weight.T), act)
        x = added(x, linear(wide, block.mlp.c_proj, block.mlp.c_proj.weight.T))
    return norm(x, model.ln_f)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def gelu_new(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


@pytest.mark.parametrize(
    ("name", "by_hand", "act"), [("bert", bert_by_hand, gelu), ("gpt2", gpt2_by_hand, gelu_new)]
)
def test_each_length_is_that_of_the_recurrence_by_hand(name: str, by_hand: Any, act: Any) -> None:
    model, inputs = zoo.build(name, dtype=torch.float64)
    found = paths.decompose(model, inputs)
    with torch.no_grad():
        wanted = by_hand(model, inputs, act)
    assert found.most == 3
    for k in range(4):
        assert distance(found.length(k), wanted[k]) < 1e-12
    assert distance(found.bias, wanted[None]) < 1e-12


def test_a_head_alone_by_hand() -> None:
    """One path of GPT-2, written out: head 3 of block 1, then nothing, then head 1 of block 3."""
    model, inputs = zoo.build("gpt2", dtype=torch.float64)
    with torch.no_grad():
        seen = model(**inputs, output_hidden_states=True, output_attentions=False).hidden_states
        x = seen[0]
        for number, head in ((0, 3), (1, 0), (2, 1)):
            block = model.h[number]
            branch = torch.zeros_like(x)
            value = seen[number]
            if head:
                normed = frozen_norm(x, value, block.ln_1)
                q, k, _ = block.attn.c_attn(block.ln_1(value)).chunk(3, -1)
                v = (normed @ block.attn.c_attn.weight).chunk(3, -1)[2]
                own = slice(8 * head - 8, 8 * head)
                scores = q[..., own] @ k[..., own].mT / 8**0.5
                pattern = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(-1)
                branch = pattern @ v[..., own] @ block.attn.c_proj.weight[own]
            x = branch if head else x
            after = value + block.attn(block.ln_1(value))[0]
            wide = model.h[number].mlp.c_fc(block.ln_2(after))
            inner = frozen_norm(x, after, block.ln_2) @ block.mlp.c_fc.weight * gelu_new(wide) / wide
            x = x + inner @ block.mlp.c_proj.weight
        last = seen[2] + model.h[2].attn(model.h[2].ln_1(seen[2]))[0]
        last = last + model.h[2].mlp(model.h[2].ln_2(last))
        wanted = frozen_norm(x, last, model.ln_f)
    found = paths.terms(model, inputs, torch.tensor([[3, 0, 1]]))[0]
    assert distance(found, wanted) < 1e-12


def frozen_norm(x: Tensor, value: Tensor, layer: nn.LayerNorm) -> Tensor:
    scale = 1 / (value.var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
    return (x - x.mean(-1, keepdim=True)) * scale * layer.weight


# ---- refused


def test_a_state_space_model_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2)
    model = transformers.MambaModel(config).eval()
    with pytest.raises(RcProbeError, match="multiplies values of the stream"):
        paths.decompose(model, {"input_ids": torch.arange(10).reshape(1, 10)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "family", ["bert", "llama", "t5_encoder", "vit", "gemma2", "bloom", "mixtral", "swin"]
)
def test_half_precision_is_run_in_float32_and_no_weight_is_touched(family: str, dtype: torch.dtype) -> None:
    """To the last bit as the same weights in float32; also where a model casts to the type of its weights (T5)."""
    model, inputs = zoo.build(family, dtype=dtype, padded=family != "swin")
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    double, before = copy.deepcopy(model).float(), copy.deepcopy(model.state_dict())
    found = paths.decompose(model, inputs)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    wanted = paths.decompose(double, wide)
    assert found.parts.dtype == torch.float32 and torch.equal(found.parts, wanted.parts)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[k].dtype == v.dtype and torch.equal(after[k], v) for k, v in before.items())


class Around(nn.Module):
    """Two plain blocks; what happens between them is given."""

    def __init__(self, inside: Any = None, outside: Any = None) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(_Block(inside) for _ in range(3))
        self.outside = outside

    def forward(self, x: Tensor) -> Tensor:
        x = start = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.outside(x, start) if self.outside else x


class _Block(nn.Module):
    def __init__(self, inside: Any) -> None:
        super().__init__()
        self.norm, self.inside = nn.LayerNorm(8), inside
        self.values, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        mixed = torch.softmax(y @ y.mT, -1) @ self.values(y)
        x = x + self.out(mixed)
        return x + torch.relu(self.inside(x) if self.inside else self.out(x))


def around(**functions: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Around(**functions).eval().double(), {"x": torch.randn(2, 5, 8).double()}


def test_an_operation_without_a_rule_is_named() -> None:
    model, inputs = around(inside=torch.special.erfcx)
    with pytest.raises(RcProbeError, match="special_erfcx"):
        paths.decompose(model, inputs)


def test_writing_into_a_view_is_refused() -> None:
    # Parts know nothing of views: the numbers would be of another model.
    def odd(x: Tensor) -> Tensor:
        y = x * 2.0
        y.view(-1, 8).mul_(3.0)
        return y

    model, inputs = around(inside=odd)
    with pytest.raises(RcProbeError, match=r"another output|written into"):
        paths.decompose(model, inputs)


class _Heads(nn.Module):
    """Two heads, and what goes past them within the branch."""

    def __init__(self, past: bool) -> None:
        super().__init__()
        self.maps, self.past = nn.ModuleList(nn.Linear(8, 8) for _ in range(5)), past

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in list(self.maps)[:3])
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.past:
            mixed = torch.cat([mixed[..., :4] * 0.5, self.maps[3](x)[..., 4:]], -1)
        x = x + self.maps[4](mixed)
        return x + torch.relu(self.maps[3](x))


@pytest.mark.parametrize("past", [False, True])
def test_a_branch_that_carries_the_stream_past_its_heads(past: bool) -> None:
    """Its lengths are exact; single heads would count what goes past them once each."""
    model, inputs = around()
    model.blocks = nn.ModuleList(_Heads(past) for _ in range(3)).double()
    found = paths.decompose(model, inputs)
    one = torch.tensor([[h if b == block else 0 for b in range(3)] for block in range(3) for h in (1, 2)])
    if past:
        with pytest.raises(RcProbeError, match="past its heads"):
            paths.terms(model, inputs, one)
        with pytest.raises(RcProbeError, match="past its heads"):
            paths.sample(model, inputs)
    else:
        assert distance(paths.terms(model, inputs, one).sum(0), found.length(1)) < 1e-12
    assert found.error < 1e-12


class _SideBySide(nn.Module):
    """Attention and MLP of the same values, added one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.maps = nn.LayerNorm(8), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        mixed = self.maps[0](torch.softmax(y @ y.mT, -1) @ self.maps[1](y))
        wide = torch.relu(self.maps[2](y))
        return x + mixed + wide


@pytest.mark.parametrize("count_mlp", [False, True])
def test_branches_side_by_side_are_one_choice(count_mlp: bool) -> None:
    model, inputs = around()
    model.blocks = nn.ModuleList(_SideBySide() for _ in range(3)).double()
    structure = find_structure(model, inputs)
    assert structure.signature == "A|M" and [b.reads for b in structure.blocks[0].branches] == [-1, -1]
    found = paths.decompose(structure, inputs, count_mlp=count_mlp)
    ways = 2 if count_mlp else 1
    assert found.counts == tuple(math.comb(3, k) * ways**k for k in range(4))
    every = torch.tensor(list(itertools.product(range(ways + 1), repeat=3)))
    terms = paths.terms(structure, inputs, every, count_mlp=count_mlp)
    for k in range(4):
        assert distance(terms[(every > 0).sum(1) == k].sum(0), found.length(k)) < 1e-12


def test_what_enters_the_first_block_stays_known_around_the_blocks() -> None:
    """A long skip from the embedding to the end is a path of length 0, not a constant."""
    model, inputs = around(outside=lambda x, start: x + 2.0 * start)
    plain, _ = around()
    found, without = paths.decompose(model, inputs), paths.decompose(plain, inputs)
    with torch.no_grad():
        start = model.first(inputs["x"])
        assert distance(found.total(), model(**inputs)) < 1e-12
    assert distance(found.length(0), without.length(0) + 2.0 * start) < 1e-12
    assert distance(found.length(2), without.length(2)) < 1e-12
    assert distance(found.bias, without.bias) < 1e-12


def test_single_paths_are_refused_where_the_stream_goes_past_the_steps() -> None:
    model, inputs = around(outside=lambda x, start: x + 2.0 * start)
    for use in (paths.terms, paths.live):
        with pytest.raises(RcProbeError, match="other ways"):
            use(model, inputs, torch.tensor([[0, 1, 0]]))


def test_states_of_several_layers_are_no_hidden_state() -> None:
    model, inputs = around(outside=lambda x, start: (start, x))
    plain, _ = around()
    close_to = paths.decompose(plain, inputs)
    assert distance(paths.decompose(model, inputs).total(), close_to.total()) < 1e-12


def test_the_users_own_tensors_stay_tensors() -> None:
    model, inputs = around()
    model.first = nn.Identity()
    x = inputs["x"]
    paths.decompose(model, inputs)
    assert type(x) is Tensor and type(inputs["x"]) is Tensor


# ---- the model afterwards


def explode(*args: Any) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "albert", "llama", "deberta_v2"])
def test_the_model_is_as_before(name: str, fail: bool) -> None:
    model, inputs = zoo.build(name)
    structure = find_structure(model, inputs)
    model.train()
    next(model.children()).eval()
    before = state(model)
    kept = {key: value.clone() for key, value in inputs.items()}
    choose = torch.zeros(2, structure.depth, dtype=torch.long)
    choose[1] = 1
    uses = [
        lambda: paths.decompose(structure, inputs),
        lambda: paths.sample(structure, inputs, paths=2, repeats=2),
        lambda: paths.terms(structure, inputs, choose),
        lambda: paths.live(structure, inputs, choose),
    ]
    if fail:
        last = structure.module(structure.blocks[-1])
        inner = [m for m in last.modules() if list(m.parameters(recurse=False))][-1]
        inner.register_forward_pre_hook(explode)
        before = state(model)
    for use in uses:
        if fail:
            with pytest.raises((ZeroDivisionError, RcProbeError)):
                use()
        else:
            use()
        same(before, state(model))
    assert all(type(v) is Tensor and torch.equal(v, kept[k]) for k, v in inputs.items())


# ---- the model behind its blocks


@pytest.mark.parametrize(
    "name", ["bert_mlm", "bert_classifier", "gpt2_lm", "vit_classifier", "albert", "albert_groups", "xlnet", "opt"]
)  # fmt: skip
def test_the_plain_stream_gives_bitwise_the_plain_output(name: str) -> None:
    model, inputs = zoo.build(name, padded=True)
    structure = find_structure(model, inputs)
    before = state(model)
    with torch.no_grad():
        plain = model(**inputs)[0]
    with ModelHead(structure, inputs) as head:
        assert torch.equal(head.plain[0], plain)
        assert torch.equal(head(head.stream)[0], plain)
        assert not torch.equal(head(head.stream * 2 - 1)[0], plain)
        assert torch.equal(head(head.stream)[0], plain)
    same(before, state(model))


def test_another_stream_is_read_by_the_models_own_head() -> None:
    model, inputs = zoo.build("gpt2_lm")
    structure = find_structure(model, inputs)
    with ModelHead(structure, inputs) as head:
        other = torch.randn_like(head.stream)
        found = head(other).logits
    with torch.no_grad():
        wanted = model.lm_head(model.transformer.ln_f(other))
    assert torch.equal(found, wanted)


def test_padding_and_ragged_batches_are_as_the_single_texts() -> None:
    model, inputs = zoo.build("bert", dtype=torch.float64, batch=3, padded=True)
    found = paths.decompose(model, inputs)
    assert found.mask is not None and torch.equal(found.mask, inputs["attention_mask"].bool())
    for row, mask in enumerate(found.mask):
        alone = paths.decompose(model, {k: v[row : row + 1, mask] for k, v in inputs.items()})
        np.testing.assert_allclose(found.parts[:, row, mask], alone.parts[:, 0], atol=1e-12)
