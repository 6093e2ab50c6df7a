"""What the user's model is: hooks on it, what it changes by itself, what is wrapped around it, how deep it is."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.by_hand import SEQ2SEQ, SIZES, blocks_of, gpt2, handed_on, ids, is_curve, made, residuals
from support.tiny import tokenizer, words
from torch import Tensor, nn

import rc_probe
from rc_probe import RcProbeError

VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(3)).double()
PART = {"gpt2": "h.1", "bloom": "h.1", "t5": "encoder.block.1"}


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def steered(output: Any, x: Tensor) -> Any:
    return x if isinstance(output, Tensor) else (x, *output[1:])


def added(module: Any, args: Any, output: Any) -> Any:
    return steered(output, first(output) + VECTOR)


def turned(module: Any, args: Any, output: Any) -> Any:
    """Leaves one direction out: a product and a difference of streams."""
    x = first(output)
    return steered(output, x - (x @ VECTOR)[..., None] * VECTOR / VECTOR.square().sum())


def written(module: Any, args: Any, output: Any) -> None:
    first(output).add_(VECTOR)


class Adapter(nn.Module):
    """A module of the user's that a hook calls."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(32, 32).double()
        nn.init.normal_(self.map.weight, std=0.1)

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        x = first(output)
        return steered(output, x + self.map(x) + VECTOR.expand_as(x))


def before(module: Any, args: Any, kwargs: Any) -> Any:
    name = "hidden_states" if not args else None
    if name:
        return args, kwargs | {name: kwargs[name] + VECTOR}
    return (args[0] + VECTOR, *args[1:]), kwargs


def build(family: str) -> Any:
    if family == "gpt2":
        return gpt2("GPT2Model")
    if family == "bloom":
        sizes = {"vocab_size": 70, "hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.1}
        return made("BloomModel", "BloomConfig", **sizes)
    sizes = {"vocab_size": 70, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 3}
    return made("T5EncoderModel", "T5Config", **sizes)


HOOKS = {"add": added, "turn": turned, "in place": written, "adapter": Adapter()}


@pytest.mark.parametrize("when", ["before", "cached", "inside"])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("family", PART)
def test_steered_blocks(family: str, hook: str, when: str) -> None:
    """The stream is what the hooks make of it, and gates are the block's own, whenever the hooks come."""
    model, (text, mask) = build(family), ids(9, 6)
    inputs = {"input_ids": text, "attention_mask": mask}
    block = model.get_submodule(PART[family])
    plain, without = copy.deepcopy(model), copy.deepcopy(model)
    for each in (plain, without):
        each.get_submodule(PART[family]).register_forward_hook(HOOKS[hook])
    _zero_mlp(without, family)
    streams = handed_on(blocks_of(plain, PART[family][:-2]), lambda: plain(**inputs))
    if when == "cached":
        rc_probe.attach(model)
    if when != "inside":
        block.register_forward_hook(HOOKS[hook])
    with torch.no_grad():
        with rc_probe.attach(model) as probe:
            handle = block.register_forward_hook(HOOKS[hook]) if when == "inside" else None
            model(**inputs)
        is_curve(probe.frame(), residuals(streams, mask), 2)
        if handle is not None:
            handle.remove()
        with rc_probe.ablate(model, "mlp@2"):
            if when == "inside":
                block.register_forward_hook(HOOKS[hook])
            ablated = model(**inputs)[0]
        assert torch.allclose(ablated, without(**inputs)[0], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(ablated, model(**inputs)[0], atol=1e-3)


def _zero_mlp(model: Any, family: str) -> None:
    """Of block 2, by its weights."""
    name = {"gpt2": "mlp.c_proj", "bloom": "mlp.dense_4h_to_h", "t5": "layer.1.DenseReluDense.wo"}[family]
    with torch.no_grad():
        for parameter in model.get_submodule(f"{PART[family]}.{name}").parameters():
            parameter.zero_()


@pytest.mark.parametrize("when", ["before", "inside"])
def test_a_steered_part_is_no_junction(when: str) -> None:
    model, (text, _) = gpt2("GPT2Model"), ids(9)
    part = model.h[1].mlp
    plain = copy.deepcopy(model)
    plain.h[1].mlp.register_forward_hook(added)
    streams = handed_on(list(plain.h), lambda: plain(text))
    if when == "before":
        part.register_forward_hook(added)
    with torch.no_grad(), rc_probe.attach(model) as probe, rc_probe.ablate(model, "attention@2=1"):
        if when == "inside":
            part.register_forward_hook(added)
        model(text)
    assert [len(block.junctions) for block in probe.structure.blocks] == [2, 2, 2]
    is_curve(probe.frame(), residuals(streams), 1)
    with torch.no_grad(), rc_probe.ablate(model, "mlp@2"):  # what the hook adds to the branch goes with it
        ablated = model(text)[0]
    _zero_mlp(plain, "gpt2")
    plain.h[1].mlp._forward_hooks.clear()
    with torch.no_grad():
        assert torch.allclose(ablated, plain(text)[0], rtol=1e-12)


@pytest.mark.parametrize("when", ["before", "inside"])
def test_what_a_hook_changes_before_a_block_is_the_stream_that_enters_it(when: str) -> None:
    model, (text, _) = gpt2("GPT2Model"), ids(9)
    streams = handed_on(list(model.h), lambda: model(text))
    steered = copy.deepcopy(model)
    steered.h[1].register_forward_pre_hook(before, with_kwargs=True)
    later = handed_on(list(steered.h), lambda: steered(text))
    wanted = residuals([streams[0], streams[1] + VECTOR.numpy(), *later[2:]])
    if when == "before":
        model.h[1].register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad(), rc_probe.attach(model) as probe:
        if when == "inside":
            model.h[1].register_forward_pre_hook(before, with_kwargs=True)
        model(text)
    assert not any(block.scaled for block in probe.structure.blocks), "proved without what the hook adds"
    is_curve(probe.frame(), wanted, 1)


def test_a_run_and_contexts_agree_on_a_steered_model() -> None:
    model, tokens = gpt2(vocab_size=32), tokenizer(special=False)
    model.transformer.h[1].register_forward_hook(added)
    model.transformer.h[2].register_forward_pre_hook(before, with_kwargs=True)
    texts = [words(6), words(6, 5)]
    options = {"init": False, "paths": False, "recursion": False, "ablate": "mlp@3", "metrics": "residual"}
    result = rc_probe.probe(model, texts, processor=tokens, **options)
    inputs = tokens(texts, return_tensors="pt")
    with torch.no_grad(), rc_probe.attach(model) as probe:
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    table = result.tables["residuals"].query("variant == 'transformer' and metric == 'residual'")
    is_curve(probe.frame(), table["mean"].tolist(), 2)
    with torch.no_grad(), rc_probe.attach(model) as probe, rc_probe.ablate(model, "mlp@3"):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    ablated = result.tables["residuals"].query("variant == 'mlp@3' and metric == 'residual'")
    is_curve(probe.frame(), ablated["mean"].tolist(), 2)


def test_a_model_that_changes_itself_is_as_before_and_measured_as_it_runs() -> None:
    sizes = SIZES | {"block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 128}
    model = made("BigBirdModel", "BigBirdConfig", **sizes)
    text, mask = ids(52, 52)
    inputs = {"input_ids": text, "attention_mask": mask}
    with torch.no_grad():
        plain = model(**inputs)[0]
    streams = handed_on(list(model.encoder.layer), lambda: model(**inputs))
    parts = [(name, id(module)) for name, module in model.named_modules()]
    with rc_probe.attach(model), torch.no_grad():  # on 16 tokens, for which it turns to full attention
        assert model.attention_type == "block_sparse"
    with torch.no_grad(), rc_probe.attach(model, inputs=inputs) as probe:
        assert torch.equal(model(**inputs)[0], plain)
    is_curve(probe.frame(), residuals(streams), 2)
    with torch.no_grad(), rc_probe.ablate(model, "attention@1=1", "mlp@all=1", inputs=inputs):
        assert torch.equal(model(**inputs)[0], plain)
    assert parts == [(name, id(module)) for name, module in model.named_modules()]
    assert model.attention_type == "block_sparse"


@pytest.fixture
def distributed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[nn.Module], nn.Module]]:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield nn.parallel.DistributedDataParallel
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["ddp", "parallel", "compiled", "compiled ddp"])
def test_what_is_wrapped_around_the_model(way: str, distributed: Callable[[nn.Module], nn.Module]) -> None:
    model, (text, mask) = gpt2("GPT2Model"), ids(9, 6)
    streams = handed_on(list(model.h), lambda: model(text, attention_mask=mask))
    without = copy.deepcopy(model)
    _zero_mlp(without, "gpt2")
    outer: Any = (
        distributed(model) if "ddp" in way else nn.DataParallel(model) if way == "parallel" else model
    )
    if "compiled" in way:
        outer = torch.compile(outer, backend="eager")
    with torch.no_grad():
        with rc_probe.attach(outer) as probe:
            outer(text, attention_mask=mask)
        is_curve(probe.frame(), residuals(streams, mask), 2)
        with rc_probe.ablate(outer, "mlp@2"):
            ablated = outer(text, attention_mask=mask)[0]
        assert torch.allclose(ablated, without(text, attention_mask=mask)[0], rtol=1e-12)


@pytest.mark.parametrize("texts", [1, 3])
def test_a_classifier_without_a_pad_token(texts: int) -> None:
    model, (text, mask) = gpt2("GPT2ForSequenceClassification"), ids(*[9] * texts)
    inputs = {"input_ids": text, "attention_mask": mask}
    one = {name: t[:1] for name, t in inputs.items()}
    streams = handed_on(list(model.transformer.h), lambda: model(**one))
    with torch.no_grad(), rc_probe.attach(model, inputs=inputs) as probe:
        model(**one)
    assert [block.signature for block in probe.structure.blocks] == ["A|M"] * 3
    is_curve(probe.frame(), residuals(streams), 1)


@pytest.mark.parametrize(("encoder", "decoder"), [(2, 1), (1, 2), (1, 1)])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_stacks_of_one_block(family: str, encoder: int, decoder: int) -> None:
    if family == "t5":
        sizes = {"vocab_size": 70, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64}
        model = made("T5Model", "T5Config", **sizes, num_layers=encoder, num_decoder_layers=decoder)
    else:
        layers = {"encoder_layers": encoder, "decoder_layers": decoder}
        model = made("BartModel", "BartConfig", **(SEQ2SEQ | layers))
    found = {name: rc_probe.attach(model, stack=name).structure for name in ("encoder", "decoder")}
    signatures = {name: [block.signature for block in one.blocks] for name, one in found.items()}
    wanted = ("A|M", "A|X|M") if family == "t5" else ("An|Mn", "An|Xn|Mn")
    assert signatures == {"encoder": [wanted[0]] * encoder, "decoder": [wanted[1]] * decoder}


def test_streams_are_read_in_their_own_numbers() -> None:
    """The reference itself: in float64, from what the library says."""
    model, (text, _) = gpt2("GPT2Model"), ids(9)
    with torch.no_grad():
        states = model(text, output_hidden_states=True).hidden_states
    streams = handed_on(list(model.h), lambda: model(text))
    assert all(np.array_equal(x, y.numpy()) for x, y in zip(streams[:-1], states[:-1], strict=True))


def test_hooks_that_fail_are_the_users_own_error() -> None:
    model, (text, _) = gpt2("GPT2Model"), ids(9)

    def fail(*args: Any) -> None:
        raise RuntimeError("mine")

    handle = model.h[1].register_forward_hook(fail)
    with pytest.raises(RcProbeError, match="its forward pass fails \\(mine\\)"):
        rc_probe.attach(model)
    handle.remove()
    with rc_probe.attach(model), torch.no_grad():
        model(text)
