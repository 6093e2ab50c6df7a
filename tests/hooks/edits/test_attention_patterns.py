"""Attention patterns against those of the library's own eager attention, or refused."""

import copy
from typing import Any

import pytest
import torch
import transformers
from support import zoo
from support.attention import OUTPUT, attached, run, seen
from support.odd_models import Odd, Plain, Stack
from support.random_models import randomise
from support.streams import PROVED, same, streams
from torch import Tensor

from rc_probe import RcProbeError
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits import attention_patterns as attention
from rc_probe.hooks.edits.attention_patterns import patterns

SHOWN = sorted({*OUTPUT, "bert_mlm", "gpt2_lm", "albert_groups"})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", SHOWN)
def test_patterns_are_those_of_an_eager_copy(name: str, padded: bool) -> None:
    model, inputs, structure = attached(name, padded=padded and zoo.ZOO[name].modality == "text")
    plain = run(model, inputs)
    found = seen(structure, inputs)
    assert torch.equal(run(model, inputs), plain)
    eager = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        wanted = eager(**inputs, output_attentions=True).attentions
    if name == "swin":  # which returns those of each stage's last block
        found = found[1::2]
    assert len(found) == len(wanted)
    # Queries of padding are nobody's: what they see differs between implementations.
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else ...
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            one.transpose(1, 2)[real], other.transpose(1, 2)[real], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("name", PROVED)
def test_seeing_patterns_changes_nothing(name: str) -> None:
    model, inputs, structure = attached(name, padded=zoo.ZOO[name].modality == "text")
    plain, found = streams(structure, inputs), [0]
    config = copy.deepcopy(vars(model.config))

    def count(block: Any, branch: Any, pattern: Tensor) -> None:
        found[0] += 1
        assert branch in block.branches
        assert not pattern.requires_grad
        pattern @ pattern.mT + pattern  # what is computed here is not counted as the model's

    with patterns(structure, count):
        same(streams(structure, inputs), plain)
    assert found[0] == sum(
        len(b.ops) for block in structure.blocks for b in block.branches if b.kind == "attention"
    )
    assert vars(model.config) == config


def test_causal_patterns_look_back_within_their_window_only() -> None:
    for name, window in (("llama", 12), ("mistral", 6), ("falcon", 12), ("gptj", 12)):
        _, inputs, structure = attached(name)
        behind = torch.arange(12)[:, None] - torch.arange(12)
        for pattern in seen(structure, inputs):
            allowed = (behind >= 0) & (behind < window)
            assert (pattern[..., ~allowed] == 0).all()
            assert (pattern[..., allowed] > 0).all()


@pytest.mark.parametrize("name", ["bert", "llama", "gemma2", "falcon", "bloom", "swin"])
def test_patterns_in_half_precision(name: str) -> None:
    model, inputs, structure = attached(name, dtype=torch.bfloat16)
    half = seen(structure, inputs)[0]
    if name not in ("gemma2", "bloom"):  # whose own softmax gives half precision
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.sum(-1), torch.ones_like(half[..., 0]))
    half = half.float()
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    full = seen(find_structure(model.float(), inputs), inputs)[0]
    assert (half - full).abs().max() < 0.05


def test_a_query_that_sees_nothing_has_a_row_of_zeros() -> None:
    """Padding at the left of a causal model: SDPA returns zeros there, and so does P times V."""
    _, inputs, structure = attached("llama")
    inputs["attention_mask"][1, :3] = 0
    pattern = seen(structure, inputs)[0]
    assert (pattern[1, :, :3] == 0).all()
    torch.testing.assert_close(pattern[1, :, 3:].sum(-1), torch.ones(4, 9))


def test_attention_sinks_leave_rows_below_one() -> None:
    config = transformers.GptOssConfig(**zoo.LLAMA | {"head_dim": 8, "sliding_window": 4})
    model = transformers.GptOssModel._from_config(config).eval()
    randomise(model, torch.float32)
    inputs = {"input_ids": torch.randint(10, 100, (2, 12), generator=torch.Generator().manual_seed(0))}
    structure = find_structure(model, inputs)
    assert {op.via for block in structure.blocks for b in block.branches for op in b.ops} == {"interface"}
    found = seen(structure, inputs)
    with torch.no_grad():
        wanted = model(**inputs, output_attentions=True).attentions
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
        sums = one.sum(-1)
        assert (sums <= 1.00001).all() and (sums < 0.99).any()


def test_patterns_that_the_op_did_not_apply_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, inputs, structure = attached("bert")
    file = transformers.models.bert.modeling_bert
    eager = file.eager_attention_forward

    def other(change: Any) -> None:
        monkeypatch.setattr(file, "eager_attention_forward", lambda *a, **k: change(*eager(*a, **k)))

    other(lambda out, weights: (out, weights.roll(1, -1)))
    with pytest.raises(RcProbeError, match=r"block 1 .*do not give what its attention returned"):
        seen(structure, inputs)
    other(lambda out, weights: (out, weights * 0.9))
    with pytest.raises(RcProbeError, match=r"block 1 .*do not sum to one"):
        seen(structure, inputs)
    other(lambda out, weights: (out, weights / 0))
    with pytest.raises(RcProbeError, match="do not sum to one"):
        seen(structure, inputs)
    other(lambda out, weights: weights[99])
    with pytest.raises(RcProbeError, match=r"its eager attention fails \(index 99"):
        seen(structure, inputs)
    other(lambda out, weights: (out, None))
    with pytest.raises(RcProbeError, match="returns no patterns"):
        seen(structure, inputs)
    monkeypatch.setattr(attention, "implementation", lambda module, name: None)
    with pytest.raises(RcProbeError, match="cannot be had from 'sdpa'"):
        seen(structure, inputs)
    assert type(structure.model.config._attn_implementation) is str


def test_patterns_of_a_model_with_dropout_on_are_refused() -> None:
    model, inputs, structure = attached("bert")
    with pytest.raises(RcProbeError, match="dropout is on"), patterns(structure, lambda *a: None):
        model.train()(**inputs)


@pytest.mark.parametrize(
    "how", ["plain", "causal", "bool mask", "float mask", "scale", "groups", "3 axes", "dropout"]
)
def test_patterns_of_torchs_attention_with_every_argument(how: str) -> None:
    """A model that is not of the library: P from the arguments of scaled_dot_product_attention."""

    class Direct(Plain):
        def attention(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            mask = torch.ones(x.shape[1], x.shape[1]).tril(2)
            attend, by_hand = torch.nn.functional.scaled_dot_product_attention, q @ k.mT / 2
            given: Any = {}
            match how:
                case "causal":
                    given, mask = {"is_causal": True}, mask.tril()
                case "bool mask":
                    given = {"attn_mask": mask.bool()}
                case "float mask":
                    given = {"attn_mask": torch.where(mask.bool(), 0.5, -torch.inf)}
                case "dropout":
                    given = {"dropout_p": 0.1 * self.training}
                case "scale":
                    given, by_hand = {"scale": 0.1}, q @ k.mT * 0.1
                case "groups":
                    k, v = k[:, :2], v[:, :2]
                    given, by_hand = {"enable_gqa": True}, q @ k.repeat_interleave(2, 1).mT / 2
                case "3 axes":
                    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            if "mask" in how or how == "causal":
                by_hand = by_hand.masked_fill(~mask.bool(), -torch.inf)
            wanted.append(by_hand.softmax(-1))
            return self.out(
                attend(q, k, v, **given).unflatten(0, (len(x), -1)).flatten(0, -4).transpose(1, 2).flatten(2)
            )

    wanted: list[Tensor] = []
    torch.manual_seed(1)
    model = Stack("add")
    model.blocks = torch.nn.ModuleList(Direct("add") for _ in range(2))
    inputs = {"input_ids": torch.randint(20, (3, 7))}
    structure = find_structure(model.eval(), inputs)
    wanted.clear()
    if how == "dropout":
        model.train()
        with pytest.raises(RcProbeError, match="dropout is on"):
            seen(structure, inputs)
        return
    found = seen(structure, inputs)
    torch.testing.assert_close(found, wanted)


def test_layouts_that_are_not_proved_show_no_patterns() -> None:
    torch.manual_seed(1)
    model = Stack("add")
    model.blocks = torch.nn.ModuleList(Odd("tokens before heads") for _ in range(3))
    structure = find_structure(model.eval(), {"input_ids": torch.randint(20, (2, 7))})
    with pytest.raises(RcProbeError, match=r"block 1 .*their layout is not proved"):
        patterns(structure, lambda *a: None)
