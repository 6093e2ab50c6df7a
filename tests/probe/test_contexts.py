"""`attach` and `ablate` on a model that the user runs."""

from types import SimpleNamespace

import pytest
import torch
from support import zoo
from torch.utils.checkpoint import checkpoint

import rc_probe
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.stream_taps import Tap
from rc_probe.metrics.stream_metrics import residual
from rc_probe.models.load import Loaded

TEXTS = ["A short text.", "A longer one, of more words than the first.", "The third."]


def test_attach_measures_what_the_user_runs(demo: Loaded) -> None:
    inputs = demo.processor(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad(), rc_probe.attach(demo.model) as probe:
        out = demo.model(**inputs).last_hidden_state
        demo.model(**inputs)
    frame = probe.frame()
    assert list(frame["metric"].unique()) == ["residual", "residual_bulk", "residual_frobenius", "cosine"]
    last = frame.query("metric == 'residual' and layer == 6").iloc[0]
    assert last["count"] == 6
    wanted = residual(out, inputs["attention_mask"].bool()).mean()
    assert last["mean"] == pytest.approx(float(wanted), rel=1e-6)
    assert len(probe.structure_frame()) == 12


def test_attach_inside_ablate_sees_the_ablated_stream(demo: Loaded) -> None:
    inputs = demo.processor(TEXTS, padding=True, return_tensors="pt")
    found = []
    for order in (0, 1):
        contexts = [rc_probe.attach(demo.model), rc_probe.ablate(demo.model, "mlp@6")]
        with torch.no_grad(), contexts[order], contexts[1 - order]:
            ablated = demo.model(**inputs).last_hidden_state
        found.append(contexts[0].frame().query("metric == 'residual'")["mean"].to_numpy())
    assert (found[0] == found[1]).all()
    wanted = residual(ablated, inputs["attention_mask"].bool()).mean()
    assert found[0][-1] == pytest.approx(float(wanted), rel=1e-6)


def test_what_a_tap_computes_is_not_counted_as_the_models() -> None:
    model, inputs = zoo.build("bert")
    structure = find_structure(model, inputs)
    sums = []
    with rc_probe.ablate(model, "mlp", inputs=inputs), Tap(structure, lambda layer, x: sums.append(x + x)):
        model(**inputs)
    assert len(sums) == 4


def test_a_tap_whose_reader_fails_keeps_nothing_of_the_pass() -> None:
    """What entered block 1 is at hand while layer 0 is handed on, and not after."""
    model, inputs = zoo.build("bert")
    held: list[object] = []

    def fail(layer: int, x: torch.Tensor) -> None:
        held.append(tap._first)
        raise KeyError

    tap = Tap(find_structure(model, inputs), fail)
    with pytest.raises(KeyError), tap:
        model(**inputs)
    assert held[0] is not None and tap._first is None


def test_two_ablations_at_once_are_both_applied() -> None:
    model, inputs = zoo.build("bert")
    with torch.no_grad():
        with rc_probe.ablate(model, "mlp@2", "attention@3", inputs=inputs):
            together = model(**inputs)[0]
        with (
            rc_probe.ablate(model, "mlp@2", inputs=inputs),
            rc_probe.ablate(model, "attention@3", inputs=inputs),
        ):
            nested = model(**inputs)[0]
        with (
            rc_probe.ablate(model, "mlp@2", inputs=inputs),
            rc_probe.ablate(model, "attention@2", inputs=inputs),
        ):
            same_block = model(**inputs)[0]
        with rc_probe.ablate(model, "mlp@2", "attention@2", inputs=inputs):
            assert torch.equal(same_block, model(**inputs)[0])
    assert torch.equal(together, nested)


def test_gates_of_the_users_own() -> None:
    model, inputs = zoo.build("gpt2")
    gate = rc_probe.Gate("mlp", (1,), value=torch.tensor([1.0, 0.0]))
    with torch.no_grad():
        plain = model(**inputs)[0]
        with rc_probe.ablate(model, gate, inputs=inputs):
            gated = model(**inputs)[0]
        with rc_probe.ablate(model, "mlp@1", inputs=inputs):
            off = model(**inputs)[0]
    assert torch.equal(gated[0], plain[0])
    assert torch.equal(gated[1], off[1])


def test_a_batch_without_a_mask_is_refused_unless_told(demo: Loaded) -> None:
    ids = demo.processor(TEXTS, padding=True, return_tensors="pt")["input_ids"]
    with pytest.raises(rc_probe.RcProbeError, match="without an attention mask"), rc_probe.attach(demo.model):
        demo.model(ids)
    with torch.no_grad(), rc_probe.attach(demo.model, mask=None) as probe:
        demo.model(ids)
    assert probe.frame()["count"].eq(3).all()
    with torch.no_grad(), rc_probe.attach(demo.model) as probe:
        demo.model(ids[:1])
    assert probe.frame()["count"].eq(1).all()


def test_nothing_seen_and_nothing_named(demo: Loaded) -> None:
    with rc_probe.attach(demo.model) as probe:
        pass
    with pytest.raises(rc_probe.RcProbeError, match="no forward pass was seen"):
        probe.frame()
    with pytest.raises(rc_probe.RcProbeError, match="nothing to ablate"):
        rc_probe.ablate(demo.model)


def test_generation_measures_the_prompt_only() -> None:
    model, inputs = zoo.build("gpt2_lm", padded=True)
    with rc_probe.attach(model, inputs=inputs) as probe:
        model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert probe.frame()["count"].eq(2).all()


def test_ablated_generation_with_a_cache_equals_one_without() -> None:
    model, inputs = zoo.build("gpt2_lm")
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with rc_probe.ablate(model, "attention.skip@2", "head@1:2", inputs=inputs):
        cached = model.generate(**inputs, **how)
        plain = model.generate(**inputs, **how, use_cache=False)
    assert torch.equal(cached, plain)
    assert not torch.equal(cached, model.generate(**inputs, **how))


def test_compiled_models_run_with_gates() -> None:
    model, inputs = zoo.build("bert")
    with torch.no_grad(), rc_probe.ablate(model, "mlp@2", inputs=inputs):
        wanted = model(**inputs)[0]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(**inputs)[0]
        with rc_probe.ablate(model, "mlp@2", inputs=inputs):
            gated = compiled(**inputs)[0]
        again = compiled(**inputs)[0]
    assert torch.equal(gated, wanted)
    assert torch.equal(plain, again)
    assert not torch.equal(plain, gated)


class Stack(torch.nn.Module):
    """Plain blocks, each run by gradient checkpointing when told how."""

    def __init__(self, depth: int = 2, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(zoo.build("gpt2")[0].h[:depth])
        self.config, self.reentrant = SimpleNamespace(num_hidden_layers=depth), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_recomputes_is_not_counted_again(reentrant: bool, depth: int) -> None:
    model, x = Stack(depth, reentrant).eval(), torch.randn(2, 6, 32, requires_grad=True)
    ran = []
    model.blocks[0].attn.register_forward_pre_hook(lambda *args: ran.append(1))
    with rc_probe.attach(model, mask=None, inputs={"x": x}) as probe:
        ran.clear()
        model(x).square().sum().backward()
    assert len(ran) == 2  # the block was recomputed indeed
    assert probe.frame()["count"].eq(2).all()
    assert probe.curves.samples == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gates_hold_in_what_checkpointing_recomputes(reentrant: bool) -> None:
    x = torch.randn(2, 6, 32, requires_grad=True)
    grads = []
    for how in (None, reentrant):
        model = Stack(2, how).eval()
        with rc_probe.ablate(model, "attention@2=0.5", "mlp@1", inputs={"x": x}):
            model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()] + [x.grad.clone()])
        x.grad = None
    pairs = list(zip(*grads, strict=True))
    assert all(a is b or torch.equal(a, b) for a, b in pairs) and sum(a is not None for a, _ in pairs) > 10


def test_a_pass_that_fails_on_the_way_leaves_nothing() -> None:
    model, inputs = zoo.build("bert")

    def fail(*args: object) -> None:
        raise ZeroDivisionError

    with torch.no_grad(), rc_probe.attach(model, mask=None, inputs=inputs) as whole:
        model(**inputs)
    with torch.no_grad(), rc_probe.attach(model, mask=None, inputs=inputs) as probe:
        for place in (model.encoder.layer[1].output, model.encoder.layer[2].attention):
            handle = place.register_forward_pre_hook(fail)
            with pytest.raises(ZeroDivisionError):
                model(**inputs)
            handle.remove()
        model.encoder.layer[2](torch.zeros(2, 12, 32))  # a block by itself is no pass
        model(**inputs)
    assert probe.frame().equals(whole.frame())
    assert probe.curves.samples == 2


def test_one_sample_has_no_deviation() -> None:
    model, inputs = zoo.build("bert", batch=1)
    with torch.no_grad(), rc_probe.attach(model, inputs=inputs) as probe:
        model(**inputs)
    std = probe.frame()["std"]
    assert std.dtype == float and std.isna().all()


class Packed(torch.nn.Module):
    """All samples in one sequence, as models of images of many sizes have it."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stack(x.flatten(0, 1)[None])


def test_samples_packed_into_one_sequence_are_refused() -> None:
    model, x = Packed().eval(), torch.randn(3, 4, 32)
    with torch.no_grad(), rc_probe.attach(model, mask=None, inputs={"x": x}) as probe:
        model(x[:1])
        with pytest.raises(rc_probe.RcProbeError, match=r"block 1.*packs all 3 samples.*one by one"):
            model(x)
    assert probe.frame()["count"].eq(1).all()


def test_masks_that_do_not_fit_are_refused(demo: Loaded) -> None:
    inputs = demo.processor(TEXTS, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"].bool()
    with (
        pytest.raises(rc_probe.RcProbeError, match="does not fit"),
        rc_probe.attach(demo.model, mask=mask[:, 1:]),
    ):
        demo.model(**inputs)
    with torch.no_grad(), rc_probe.attach(demo.model) as by_place:
        demo.model(inputs["input_ids"], inputs["attention_mask"])
    with torch.no_grad(), rc_probe.attach(demo.model, mask=mask) as given:
        demo.model(**inputs)
    assert by_place.frame().equals(given.frame())


def test_the_mask_of_an_earlier_call_is_not_used(demo: Loaded) -> None:
    inputs = demo.processor(TEXTS, padding=True, return_tensors="pt")
    with pytest.raises(rc_probe.RcProbeError, match="without an attention mask"), rc_probe.attach(demo.model):
        demo.model(**inputs)
        demo.model(inputs["input_ids"])


def test_patches_of_one_image_are_one_sample() -> None:
    """Qwen2-VL packs the patches of all images into one row; how many images there are, the grid says."""
    from census.build import build
    from census.inputs import inputs_for

    model = build("qwen2_vl_vision")
    inputs = inputs_for(model)
    name = next(key for key in inputs if "grid" in key)
    patches = int(inputs[name][0].prod())
    main = next(key for key in inputs if key != name)
    one = {main: inputs[main][:patches], name: inputs[name][:1]}
    with rc_probe.attach(model, inputs=inputs, mask=None) as probe, torch.no_grad():
        model(**one)
        assert len(probe.frame()["layer"].unique()) == probe.structure.depth + 1
        with pytest.raises(rc_probe.RcProbeError, match="packs all 2 samples"):
            model(**inputs)
