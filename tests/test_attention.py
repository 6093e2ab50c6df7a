"""The attention op: how it is owned, its heads against zeroed weights, its patterns against the library's own."""

import copy
import pickle
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
import transformers
import zoo
from test_gates import PROVED, same, streams
from test_structure import Odd, Plain, Stack
from torch import Tensor

import rc_probe
from rc_probe import Gate, RcProbeError
from rc_probe.hooks import attention, interface
from rc_probe.hooks.attention import patterns
from rc_probe.hooks.edits import Editing, Edits
from rc_probe.hooks.gates import gate_edits
from rc_probe.hooks.inputs import with_no_cache
from rc_probe.hooks.prove import find_structure
from rc_probe.hooks.structure import Structure
from rc_probe.run import structure_rows

# Read off the modeling files: these make their patterns themselves, all others ask AttentionInterface.
INTERCEPTED = {
    "xlnet": "softmax", "xlnet_two_streams": "softmax", "deberta_v2": "softmax", "mpnet": "softmax",
    "gptj": "softmax", "bloom": "softmax",
    "falcon": "scaled_dot_product_attention", "falcon_new": "scaled_dot_product_attention",
}  # fmt: skip

OUTPUT = {  # the output projection, whose input is the heads side by side
    "bert": "attention.output.dense", "roberta": "attention.output.dense", "electra": "attention.output.dense",
    "distilbert": "attention.out_lin", "albert": "attention.dense", "mpnet": "attention.attn.o",
    "deberta_v2": "attention.output.dense", "xlnet": "rel_attn", "modernbert": "attn.Wo",
    "t5_encoder": "layer.0.SelfAttention.o", "gpt2": "attn.c_proj", "opt": "self_attn.out_proj",
    "opt_post_norm": "self_attn.out_proj", "gpt_neox": "attention.dense", "gptj": "attn.out_proj",
    "bloom": "self_attention.dense", "falcon": "self_attention.dense", "falcon_new": "self_attention.dense",
    "llama": "self_attn.o_proj", "mistral": "self_attn.o_proj", "qwen3": "self_attn.o_proj",
    "gemma2": "self_attn.o_proj", "phi": "self_attn.dense", "mixtral": "self_attn.o_proj",
    "olmo2": "self_attn.o_proj", "vit": "attention.o_proj", "dinov2": "attention.o_proj",
    "beit": "attention.o_proj", "clip_vision": "self_attn.out_proj", "swin": "attention.o_proj",
}  # fmt: skip
SHOWN = sorted({*OUTPUT, "bert_mlm", "gpt2_lm", "albert_groups"})
FEW = ["bert", "gpt2", "llama", "gemma2", "falcon", "bloom"]  # interface sdpa and eager, both interceptions


def attached(name: str, **how: Any) -> tuple[Any, Any, Structure]:
    model, inputs = zoo.build(name, **how)
    return model, inputs, find_structure(model, inputs)


@torch.no_grad()
def run(model: Any, inputs: Any) -> Tensor:
    out: Tensor = model(**inputs)[0]
    return out


def seen(structure: Structure, inputs: Any) -> list[Tensor]:
    """The patterns of a pass, in the order in which they come."""
    found: list[Tensor] = []
    with patterns(structure, lambda block, branch, pattern: found.append(pattern)):
        run(structure.model, inputs)
    return found


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
    for name, passes in (("bert", 3), ("bloom", 3)):
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
    zoo.randomise(model, torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 100, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return model, {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :7]}


# ---- patterns


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
    zoo.randomise(model, torch.float32)
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


# ---- contexts at once, and after them


@pytest.mark.parametrize("name", FEW)
def test_contexts_compose_in_any_order(name: str) -> None:
    model, inputs, structure = attached(name)
    both = streams(structure, inputs, [Gate("head", 2, (1, 3)), Gate("mlp", 3)])
    contexts = [
        Editing(structure, gate_edits(structure, gates))
        for gates in ([Gate("head", 2, 1)], [Gate("mlp", 3)], [Gate("head", 2, 3)])
    ]
    shown: list[list[Tensor]] = [[], []]
    for into, order in zip(shown, ((0, 1, 2, "see"), ("see", 2, 0, 1)), strict=True):
        with ExitStack() as stack:
            for one in order:
                watch = patterns(structure, lambda b, k, p, into=into: into.append(p))
                stack.enter_context(watch if one == "see" else contexts[int(one)])
            probe = stack.enter_context(rc_probe.attach(model, inputs=inputs))
            out = run(model, inputs)
        assert probe.curves.samples == 2
        assert torch.equal(out, last(model, inputs, structure, both))
    for first, second in zip(*shown, strict=True):
        assert torch.equal(first, second)
    plain = seen(structure, inputs)
    assert torch.equal(shown[0][1], plain[1])  # the pattern before its heads are gated
    assert not torch.equal(shown[0][2], plain[2])


def last(model: Any, inputs: Any, structure: Structure, found: list[Tensor]) -> Tensor:
    """The model's output for a last stream that was found: with it put in place of the plain one."""
    block = structure.module(structure.blocks[-1])

    def put(module: Any, args: Any, out: Any) -> Any:
        return found[-1] if isinstance(out, Tensor) else (found[-1], *out[1:])

    with block.register_forward_hook(put):
        return run(model, inputs)


@pytest.mark.parametrize("name", ["bert", "gemma2"])
def test_contexts_closed_out_of_order(name: str) -> None:
    model, inputs, structure = attached(name)
    before, plain = model.config._attn_implementation, run(model, inputs)
    one, two = (Editing(structure, gate_edits(structure, [Gate("head", 2, h)])) for h in (1, 2))
    with two:
        alone = run(model, inputs)
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert torch.equal(run(model, inputs), alone)
    assert type(model.config._attn_implementation) is not str
    two.__exit__(None, None, None)
    assert torch.equal(run(model, inputs), plain)
    assert type(model.config._attn_implementation) is str
    assert model.config._attn_implementation == before


def test_an_edit_of_what_enters_the_op_is_seen_by_the_patterns() -> None:
    """The place of later temperatures and masks: around_op. A watcher sees the op as it ran."""
    for name in ("bert", "falcon", "bloom"):
        _, inputs, structure = attached(name)
        op = structure.blocks[1].branches[0].ops[0] if name != "falcon" else attention_op(structure, 1)
        edits = Edits()
        place = {"interface": 1}.get(op.via, 0)  # the query; of a softmax, the scores

        def flatten(call: Any, go: Any, place: int = place) -> Any:
            args = list(call.args)
            args[place] = torch.zeros_like(args[place])
            return go(
                interface.OpCall(call.via, call.function, tuple(args), call.kwargs, call.implementation)
            )

        edits.around_op(1, op, flatten)
        for first in (True, False):
            found: list[Tensor] = []
            watch = patterns(structure, lambda b, k, p, found=found: found.append(p))
            with ExitStack() as stack:
                for context in (Editing(structure, edits), watch)[:: 1 if first else -1]:
                    stack.enter_context(context)
                run(structure.model, inputs)
            pattern = found[1]
            allowed = pattern > 0
            uniform = allowed / allowed.sum(-1, keepdim=True)
            if name != "falcon":
                torch.testing.assert_close(pattern, uniform)
            assert not torch.allclose(found[0], (found[0] > 0) / (found[0] > 0).sum(-1, keepdim=True))


def attention_op(structure: Structure, block: int) -> Any:
    return next(b.ops[0] for b in structure.blocks[block].branches if b.kind == "attention")


def test_two_models_with_one_config_do_not_meet() -> None:
    first, inputs = zoo.build("bert")
    second = transformers.BertModel(first.config).eval()
    zoo.randomise(second, torch.float32, seed=5)
    assert second.config is first.config
    structure, plain = find_structure(first, inputs), run(second, inputs)
    after = [torch.empty(0)]
    inner = first.encoder.layer[1].attention.self
    with Editing(structure, gate_edits(structure, [Gate("head", heads=(1, 2, 3, 4))])):
        assert torch.equal(run(second, inputs), plain)
        with inner.register_forward_pre_hook(lambda *a: after.append(statistic(second)) and None):
            gated = run(first, inputs)
        assert torch.equal(run(first, inputs), gated)
    assert torch.equal(after[-1], statistic(second))
    assert torch.equal(run(second, inputs), plain)
    with (
        Editing(structure, gate_edits(structure, [Gate("head", 1, 1)])),
        rc_probe.ablate(second, "head@1:2", inputs=inputs),
    ):
        one, two = run(first, inputs), run(second, inputs)
    assert torch.equal(one, alone(first, "head@1:1", inputs))
    assert torch.equal(two, alone(second, "head@1:2", inputs))


@torch.no_grad()
def statistic(model: Any) -> Tensor:
    """An attention of the model called by itself, where no mode counts it."""
    with torch._C.DisableTorchFunction():
        out: Tensor = model.encoder.layer[0].attention.self(torch.eye(5, 32)[None])[0]
    return out


def alone(model: Any, what: str, inputs: Any) -> Tensor:
    with rc_probe.ablate(model, what, inputs=inputs):
        return run(model, inputs)


@pytest.mark.parametrize("where", ["on_pattern", "model", "body"])
@pytest.mark.parametrize("name", ["bert", "albert", "gemma2", "bloom"])
def test_everything_is_as_before_after_an_error(name: str, where: str) -> None:
    model, inputs, structure = attached(name)
    before, plain = model.config._attn_implementation, run(model, inputs)
    inner = next(m for n, m in model.named_modules() if n.endswith(("attention", "self_attn")))

    def explode(*args: Any) -> None:
        raise ZeroDivisionError

    context = patterns(structure, explode if where == "on_pattern" else lambda *a: None)
    fails = inner.register_forward_hook(explode) if where == "model" else nullcontext()
    with pytest.raises(ZeroDivisionError), fails, context:
        run(model, inputs)
        explode()
    assert type(model.config._attn_implementation) is str
    assert model.config._attn_implementation is before
    assert not interface.running.listeners
    assert not interface._held
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.equal(run(model, inputs), plain)


def test_each_config_gets_its_own_implementation_back() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"vocab_size": 100, "max_position_embeddings": 20}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 8}
    )
    model = transformers.CLIPModel(config).eval()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    configs = [model.config, model.config.text_config, model.config.vision_config]
    before = [c._attn_implementation for c in configs]
    assert before[1:] == ["eager", "sdpa"]
    with interface.owned(model), interface.owned(model.vision_model):
        assert all(type(c._attn_implementation) is interface.Owned for c in configs)
        assert [str.__str__(c._attn_implementation) for c in configs[1:]] == [
            "rc-probe:eager",
            "rc-probe:sdpa",
        ]
        configs[2]._attn_implementation = "eager"  # the user's own change stays
    assert [c._attn_implementation for c in configs] == [before[0], "eager", "eager"]
    assert all(type(c._attn_implementation) is str for c in configs)


def test_code_that_asks_for_the_implementation_sees_the_original() -> None:
    model, inputs = zoo.build("bert")
    with interface.owned(model):
        name = model.config._attn_implementation
        assert name == "sdpa"
        assert "sdpa" == name  # noqa: SIM300
        assert not name != "sdpa"  # noqa: SIM202
        assert name in ("eager", "sdpa")
        assert name != "eager"
        others = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model.config)
        assert find_structure(model, inputs) is find_structure(model, inputs)
    for other in others:
        assert type(getattr(other, "config", other)._attn_implementation) is str
    assert model.config.to_dict() == others[0].config.to_dict()
    found = find_structure(model, inputs)
    with rc_probe.ablate(model, "head@1:1", inputs=inputs):
        assert find_structure(model, inputs) is found


def test_the_library_that_does_not_call_the_interface_any_more_is_told() -> None:
    model, inputs, structure = attached("bert")
    gated = rc_probe.ablate(model, "head@1:1", inputs=inputs)
    with pytest.raises(RcProbeError, match="0 calls of the attention interface"), gated:
        model.set_attn_implementation("eager")
        run(model, inputs)
    assert model.config._attn_implementation == "eager"
    assert structure.blocks[0].routed == 1


def test_a_model_that_asks_for_its_implementation_runs_the_same_on_inputs_longer_than_the_probes() -> None:
    """DeepSeek's sparse attention is dense up to index_topk tokens, and masks the rest only if told "sdpa"."""
    ranks = {
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    experts = {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    }
    index = {"index_topk": 16, "index_n_heads": 4, "index_head_dim": 8, "first_k_dense_replace": 3}
    config = transformers.DeepseekV32Config(**zoo.BERT | ranks | experts | index)
    model = transformers.DeepseekV32Model._from_config(config).eval()
    zoo.randomise(model, torch.float32)
    long = {"input_ids": torch.randint(10, 100, (2, 40), generator=torch.Generator().manual_seed(0))}
    structure = find_structure(model)
    assert structure.blocks[0].routed == 1
    plain = streams(structure, long)
    same(streams(structure, long, [Gate("head", heads=1, value=1.0)]), plain)
    assert ((seen(structure, long)[0] > 0).sum(-1) <= 16).all()


def test_heads_and_patterns_of_a_generation_with_a_cache() -> None:
    model = transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**zoo.LLAMA)).eval()
    zoo.randomise(model, torch.float32)
    inputs = {"input_ids": torch.arange(20, 32).view(2, 6), "attention_mask": torch.ones(2, 6).long()}
    inputs["attention_mask"][0, :2] = 0
    how = {"max_new_tokens": 4, "do_sample": False}
    plain, shapes = model.generate(**inputs, **how), []
    with patterns(find_structure(model), lambda block, branch, p: shapes.append(tuple(p.shape))):
        assert torch.equal(model.generate(**inputs, **how), plain)
    assert shapes[::3] == [(2, 4, 6, 6), (2, 4, 1, 7), (2, 4, 1, 8), (2, 4, 1, 9)]
    with rc_probe.ablate(model, "head@1:1", "head@2:3"):
        cached, whole = (model.generate(**inputs, **how, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, plain)
