"""The attention op under several contexts at once, and the configs and models after them."""

import copy
import pickle
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
import transformers
from support import zoo
from support.attention import FEW, attached, run, seen
from support.random_models import randomise
from support.streams import same, streams
from torch import Tensor

import rc_probe
from rc_probe import Gate, RcProbeError
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits import attention_interface as interface
from rc_probe.hooks.edits.attention_patterns import patterns
from rc_probe.hooks.edits.edits import Editing, Edits
from rc_probe.hooks.edits.gates import gate_edits
from rc_probe.hooks.structure.structure import Structure


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
    randomise(second, torch.float32, seed=5)
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
        run(model, inputs)


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
    randomise(model, torch.float32)
    long = {"input_ids": torch.randint(10, 100, (2, 40), generator=torch.Generator().manual_seed(0))}
    structure = find_structure(model)
    assert structure.blocks[0].routed == 1
    plain = streams(structure, long)
    same(streams(structure, long, [Gate("head", heads=1, value=1.0)]), plain)
    assert ((seen(structure, long)[0] > 0).sum(-1) <= 16).all()


def test_heads_and_patterns_of_a_generation_with_a_cache() -> None:
    model = transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**zoo.LLAMA)).eval()
    randomise(model, torch.float32)
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
