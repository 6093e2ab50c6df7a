"""Whatever is done to a model, it is as before afterwards, also when the body raises."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support import zoo
from support.untouched import same, state

import rc_probe


def attach(model: Any, inputs: Any, fail: bool) -> None:
    with rc_probe.attach(model, mask=None, inputs=inputs):
        model(**inputs)
        if fail:
            raise ZeroDivisionError


def ablate(model: Any, inputs: Any, fail: bool) -> None:
    with rc_probe.ablate(model, "mlp@2", "attention.skip", "head@1:1", "mlp.sublayer@1", inputs=inputs):
        model(**inputs)
        if fail:
            raise ZeroDivisionError


def fail_inside_a_block(model: Any, inputs: Any, fail: bool) -> None:
    """The failure comes out of the middle of a gated block."""

    def explode(*args: Any) -> None:
        if fail:
            raise ZeroDivisionError

    attention = next(m for n, m in model.named_modules() if n.endswith(("attention", "attn", "self_attn")))
    with rc_probe.ablate(model, "mlp", "attention", inputs=inputs):
        handle = attention.register_forward_pre_hook(explode)
        try:
            model(**inputs)
        finally:
            handle.remove()


def fail_on_an_unknown_block(model: Any, inputs: Any, fail: bool) -> None:
    with (
        suppress(rc_probe.RcProbeError),
        rc_probe.ablate(model, "mlp@99" if fail else "mlp@1", inputs=inputs),
    ):
        model(**inputs)


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("use", [attach, ablate, fail_inside_a_block, fail_on_an_unknown_block])
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "albert", "llama"])
def test_model_is_as_before(name: str, use: Callable[..., None], fail: bool) -> None:
    model, inputs = zoo.build(name)
    model.train()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    with torch.no_grad(), torch.random.fork_rng():  # training mode draws for dropout
        plain = model.eval()(**inputs)[0]
        with suppress(ZeroDivisionError):
            model.train()
            next(model.children()).eval()
            use(model, inputs, fail)
    same(before, state(model))
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs)[0], plain)


@pytest.mark.parametrize("break_at", [None, 1, 4, 10])
def test_probe_leaves_the_model_as_it_was(demo: Any, break_at: int | None, tmp_path: Path) -> None:
    model = demo.model
    model.train()
    before = state(model)
    calls = [0]

    def progress(stage: str, done: int, total: int) -> None:
        calls[0] += 1
        if calls[0] == break_at:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        rc_probe.probe(
            model, ["A text of several words.", "Another one, a little longer."], processor=demo.processor,
            ablate=("mlp@2",), init_seeds=2, progress=progress, recursion=False,
        )  # fmt: skip
    assert break_at is None or calls[0] == break_at
    same(before, state(model))
    model.eval()
    if break_at is None:
        model.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").stat().st_size > 1e6


def test_gradients_flow_through_gates() -> None:
    model, inputs = zoo.build("bert")
    with rc_probe.ablate(model, "mlp@2", inputs=inputs):
        model(**inputs)[0].sum().backward()
    layers = model.encoder.layer
    assert layers[1].attention.output.dense.weight.grad.abs().sum() > 0
    assert layers[1].output.dense.weight.grad is None  # what is removed is not part of the graph
