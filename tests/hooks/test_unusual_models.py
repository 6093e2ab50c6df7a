"""Models that are compiled, quantised, adapted, shared, offloaded, in half precision or the user's own:
each works exactly as the plain model, or is refused with the reason.
"""

import copy
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny, zoo
from support.random_models import randomise
from torch import Tensor, nn

import rc_probe
from rc_probe.models.fresh_weights import fresh_model
from rc_probe.models.load import load_model

Inputs = dict[str, Any]
PARTS = ("mlp@2", "attention.skip@1", "head@1:2")
ONES = ("attention=1", "attention.skip=1", "mlp=1")
TEXTS = ["w1 w2 w3 w4 w5", "w3 w9 w4", "w7 w7 w8 w2"]


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def survives(model: Any, plain: Any, inputs: Inputs, parts: tuple[str, ...] = PARTS) -> None:
    """`model` has the structure, the streams and the ablated outputs of `plain`, bitwise, and is as before."""
    before = first(model(**inputs))
    frames, found = [], []
    for one in (plain, model):
        with rc_probe.attach(one, mask=None, inputs=inputs) as probe:
            one(**inputs)
        frames.append(probe.frame())
        found.append(probe.structure)
        with rc_probe.ablate(one, *ONES, inputs=inputs):
            found.append(first(one(**inputs)))
        with rc_probe.ablate(one, *parts, inputs=inputs):
            found.append(first(one(**inputs)))
    (structure, kept, gated), (like, again, wanted) = found[3:], found[:3]
    assert [b.signature for b in structure.blocks] == [b.signature for b in like.blocks]
    assert torch.equal(kept, again)
    assert torch.equal(gated, wanted)
    assert not torch.equal(gated, kept)
    assert frames[0].equals(frames[1])
    assert torch.equal(first(model(**inputs)), before)


def refuses(says: str, use: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(rc_probe.RcProbeError, match=says) as caught:
        use(*args, **kwargs)
    assert "\n" not in str(caught.value)


def measured(model: Any, **settings: Any) -> rc_probe.ProbeResult:
    settings = {"metrics": "residual", "recursion": False} | settings
    return rc_probe.probe(model, TEXTS, processor=tiny.tokenizer(), **settings)


def values(result: rc_probe.ProbeResult, weights: str = "pretrained") -> Any:
    return result.tables["residuals"].query("weights == @weights")["mean"].to_numpy()


# ---- torch.compile


class Counting:
    """A compiler that counts its graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def compiled(model: Any, how: str, backend: Any) -> Any:
    torch._dynamo.reset()
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    if how == "wrapped":
        return torch.compile(model, backend=backend)
    if how == "in place":
        model.compile(backend=backend)
    else:
        blocks[1] = torch.compile(blocks[1], backend=backend)
    return model


@pytest.mark.parametrize("how", ["wrapped", "in place", "one block"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_compiled(name: str, how: str) -> None:
    (model, inputs), (plain, _) = zoo.build(name), zoo.build(name)
    backend = Counting()
    model = compiled(model, how, backend)
    with torch.no_grad():
        model(**inputs)
    made = backend.graphs
    assert made > 0
    survives(model, plain, inputs)
    assert backend.graphs == made  # the graph of before runs again


def test_compiled_is_probed_as_the_model_inside() -> None:
    results = [measured(m, init_seeds=1) for m in (zoo.build("bert")[0], compiled(zoo.build("bert")[0], "wrapped", "eager"))]  # fmt: skip
    assert results[0].tables["residuals"].equals(results[1].tables["residuals"])
    assert results[1].model["class"] == "BertModel"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_to_machine_code() -> None:
    (model, inputs), (plain, _) = zoo.build("bert"), zoo.build("bert")
    survives(compiled(model, "wrapped", "inductor"), plain, inputs)


# ---- quantised


def int8(model: Any, activations: bool = False) -> Any:
    ao = pytest.importorskip("torchao.quantization")
    ao.quantize_(
        model, ao.Int8DynamicActivationInt8WeightConfig() if activations else ao.Int8WeightOnlyConfig()
    )
    return model


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt_neox"])
def test_int8(name: str, activations: bool) -> None:
    """What is right is known from the same model with its weights written out, where only these are int8."""
    (model, inputs), (full, _) = zoo.build(name), zoo.build(name)
    model = int8(model, activations)
    survives(model, copy.deepcopy(model), inputs)
    signatures = [rc_probe.attach(m, inputs=inputs).structure.signature for m in (model, full)]
    assert signatures[0] == signatures[1]
    with torch.no_grad(), rc_probe.ablate(model, *PARTS, inputs=inputs):
        gated = model(**inputs)[0]
    with torch.no_grad(), rc_probe.ablate(full, *PARTS, inputs=inputs):
        wanted = full(**inputs)[0]
    assert (gated - wanted).abs().mean() < 0.05 * wanted.abs().mean()


def test_int8_is_probed_beside_full_fresh_weights() -> None:
    plain = measured(zoo.build("bert")[0], init_seeds=1)
    found = measured(int8(zoo.build("bert")[0]), init_seeds=1)
    assert (values(found, "init") == values(plain, "init")).all()
    assert values(found) == pytest.approx(values(plain), abs=0.05)


@pytest.mark.filterwarnings("ignore")
def test_int8_that_shares_one_scale_over_the_batch_is_refused() -> None:
    model, inputs = zoo.build("bert")
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    refuses(
        "block 1.*one sample of a batch depends on the others.*torchao", rc_probe.attach, model, inputs=inputs
    )
    refuses("one sample of a batch depends on the others", measured, model)


def test_quantised_checkpoints(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    import transformers
    from torchao.quantization import Int8WeightOnlyConfig

    plain = tiny.saved(tmp_path / "plain", tiny.bert(), tiny.tokenizer())
    how = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    model = transformers.BertModel.from_pretrained(plain, quantization_config=how)
    loaded = load_model(tiny.saved(tmp_path / "int8", model, tiny.tokenizer()), device="cpu")
    assert type(loaded.model.encoder.layer[0].output.dense.weight).__name__ == "Int8Tensor"
    found = rc_probe.probe(str(tmp_path / "int8"), TEXTS, metrics="residual", recursion=False, init=False)
    assert (values(found) == values(measured(model, init=False))).all()
    config = tmp_path / "plain" / "config.json"
    gptq = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    config.write_text(json.dumps(json.loads(config.read_text()) | gptq))
    refuses("GPTQ quantized model requires", load_model, plain)


def test_libraries_that_log_as_they_are_imported_are_quiet(tmp_path: Path) -> None:
    """torchao does, and transformers imports it."""
    folder = tiny.saved(tmp_path / "m", tiny.bert(), tiny.tokenizer())
    (tmp_path / "t.txt").write_text("w1 w2 w3\nw3 w4 w5\n")
    options = ["--data", "t.txt", "--quiet", "--no-init", "--no-recursion", "--metrics", "residual"]
    command = [sys.executable, "-m", "rc_probe", folder, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert logging.root.manager.disable == 0


# ---- adapters


def lora(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_lora(name: str) -> None:
    model, inputs = zoo.build(name)
    plain, _ = zoo.build(name)
    adapted, inside = lora(model), model
    survives(adapted, inside, inputs)  # the library puts the adapter into the model it was given
    with adapted.disable_adapter():  # the proof of another state is not used again
        survives(adapted, plain, inputs)
    survives(adapted, inside, inputs)
    merged = copy.deepcopy(adapted).merge_and_unload()
    survives(merged, copy.deepcopy(merged), inputs)
    with torch.no_grad(), rc_probe.ablate(merged, *PARTS, inputs=inputs):
        wanted = merged(**inputs)[0]
    with torch.no_grad(), rc_probe.ablate(adapted, *PARTS, inputs=inputs):
        assert torch.allclose(adapted(**inputs)[0], wanted, atol=1e-4)


def test_lora_is_probed_beside_the_fresh_base_model() -> None:
    plain = measured(zoo.build("bert")[0], init_seeds=1)
    found = measured(lora(zoo.build("bert")[0]), init_seeds=1)
    assert (values(found, "init") == values(plain, "init")).all()
    assert not (values(found) == values(plain)).all()


def test_prompts_that_are_learned() -> None:
    """A learned prompt lengthens the stream, padded or not; keys and values from elsewhere are refused."""
    peft = pytest.importorskip("peft")
    made = {}
    for kind in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        model, inputs = zoo.build("gpt2_lm")
        made[kind] = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    prompt, prefix = made.values()
    survives(prompt, copy.deepcopy(prompt), inputs)
    alone = values(measured(prompt, batch_size=1, init=False))
    assert len(alone) == 16
    assert values(measured(prompt, init=False)) == pytest.approx(alone, rel=1e-5)
    refuses("block 1.*prefix tuning", rc_probe.attach, prefix, inputs=inputs)
    refuses("block 1.*prefix tuning", measured, prefix)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The folder of an adapter, beside that of its base model."""
    base = tiny.saved(tmp_path / "base", tiny.bert("BertForMaskedLM"), tiny.tokenizer())
    model = lora(load_model(base, device="cpu").model)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_folder_of_an_adapter(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    loaded = load_model(str(adapter), device="cpu")
    base = load_model(str(adapter.parent / "base"), device="cpu").model
    wanted = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(adapter)).eval()
    ids = torch.tensor([[1, 5, 6, 7, 2]])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids)[0], wanted(ids)[0])
        assert not torch.equal(loaded.model(ids)[0], base(ids)[0])
    assert (
        rc_probe.probe(str(adapter), TEXTS, metrics="residual", recursion=False).model["signature"] == "An|Mn"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuses(
        "adapter of .*base, and peft is not installed.*pip install peft, or merge", load_model, str(adapter)
    )


def test_adapters_that_cannot_be_loaded(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = adapter / "adapter_config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps(raw | {"base_model_name_or_path": "nobody/base"}))
    monkeypatch.setattr(
        "rc_probe.models.locate.hub_problem", lambda: "the Hugging Face Hub cannot be reached"
    )
    refuses("adapter, an adapter of nobody/base: .*cannot be reached", load_model, str(adapter))
    config.write_text(json.dumps(raw | {"base_model_name_or_path": "/not/there"}))
    refuses("an adapter of /not/there: no such folder", load_model, str(adapter))
    config.write_text(json.dumps(raw | {"base_model_name_or_path": None}))
    refuses("an adapter without its base model", load_model, str(adapter))
    config.write_text(json.dumps(raw))
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuses("the adapter does not load", load_model, str(adapter))
    weights.unlink()
    refuses("no adapter_model.safetensors.*--allow-pickle", load_model, str(adapter))


def test_an_adapter_that_lacks_weights(adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    refuses("not in its file and would be random", load_model, str(adapter))


# ---- shared, offloaded, half precision


class Shared(nn.Module):
    """One block object at several places of a list, and blocks that another model holds, too."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_one_block_at_several_places() -> None:
    a, b, *_ = zoo.build("gpt2")[0].h
    shared, apart = Shared([a, b, a]).eval(), Shared([a, b, copy.deepcopy(a)]).eval()
    inputs = {"x": torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))}
    survives(shared, apart, inputs)
    for part in ("mlp@1", "mlp@3", "head@3:1"):  # the call counts, not the module
        survives(shared, apart, inputs, (part,))


def test_two_models_that_share_blocks() -> None:
    a, b, *_ = zoo.build("gpt2")[0].h
    one, other = Shared([a, b]).eval(), Shared([b, a]).eval()
    inputs = {"x": torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        with rc_probe.ablate(one, "mlp@1", inputs=inputs):
            first_off = one(**inputs)
        with rc_probe.ablate(other, "mlp@2", inputs=inputs):
            last_off = other(**inputs)
        with rc_probe.attach(one, mask=None, inputs=inputs) as probe:
            one(**inputs)
            other(**inputs)  # its blocks are those of `one`, in another order: no pass of it
        assert probe.frame()["count"].eq(2).all()
        whole, tail = copy.deepcopy(one), copy.deepcopy(other)
        with rc_probe.ablate(whole, "mlp@1", inputs=inputs), rc_probe.ablate(tail, "mlp@2", inputs=inputs):
            assert torch.equal(whole(**inputs), first_off)
            assert torch.equal(tail(**inputs), last_off)


def test_tied_embeddings() -> None:
    model, inputs = zoo.build("gpt2_lm")
    assert model.lm_head.weight is model.transformer.wte.weight
    survives(model, copy.deepcopy(model), inputs)
    fresh = fresh_model(model)
    assert fresh.lm_head.weight is fresh.transformer.wte.weight


def offloaded(model: Any, how: str, folder: Path) -> Any:
    import accelerate

    if how == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk":
        accelerate.disk_offload(model, str(folder), execution_device="cpu")
    else:
        places = {
            name: "disk" if number else "cpu" for number, (name, _) in enumerate(model.named_children())
        }
        model = accelerate.dispatch_model(
            model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
        )
    return model


@pytest.mark.parametrize("how", ["cpu", "disk", "map"])
@pytest.mark.parametrize("name", ["bert", "albert"])
def test_offloaded(name: str, how: str, tmp_path: Path) -> None:
    (model, inputs), (plain, _) = zoo.build(name), zoo.build(name)
    model = offloaded(model, how, tmp_path)
    assert any(p.is_meta for p in model.parameters())
    survives(model, plain, inputs)
    assert any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("how", ["cpu", "disk", "map"])
def test_offloaded_is_probed(how: str, tmp_path: Path) -> None:
    plain = measured(zoo.build("bert")[0], init_seeds=1)
    model = offloaded(zoo.build("bert")[0], how, tmp_path)
    if how == "map":
        found = measured(model)  # the fresh copy would have to be offloaded, too
        assert any("offloaded to disk cannot be initialised afresh" in note for note in found.model["notes"])
        assert (values(found) == values(plain)).all()
        assert set(found.tables["residuals"]["weights"]) == {"pretrained"}
    else:
        assert measured(model, init_seeds=1).tables["residuals"].equals(plain.tables["residuals"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    (model, inputs), (full, like) = zoo.build(name, dtype=dtype), zoo.build(name)
    survives(model, copy.deepcopy(model), inputs)
    half, whole = (rc_probe.attach(*pair).structure for pair in ((model,), (full,)))
    assert half.signature == whole.signature
    with torch.no_grad(), rc_probe.ablate(full, *PARTS, inputs=like):
        wanted = full(**like)[0]
    with torch.no_grad(), rc_probe.ablate(model, *PARTS, inputs=inputs):
        assert (model(**inputs)[0].float() - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    if name == "bert":
        assert values(measured(model)) == pytest.approx(values(measured(full)), abs=0.02)


# ---- gradient checkpointing of the library, threads


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", ["mlp@2", "head@2:1", "attention.skip=0.5", "mlp.sublayer@1"])
def test_blocks_that_checkpoint_themselves(part: str, reentrant: bool) -> None:
    """The library recomputes a block past its hooks: gates would be missing from the gradients."""
    model, inputs = zoo.build("bert")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with rc_probe.attach(model, mask=None, inputs=inputs) as probe:
        model(**inputs)[0].square().sum().backward()
    assert probe.frame()["count"].eq(2).all()
    with rc_probe.ablate(model, part, inputs=inputs):
        refuses(r"block [12] .*without its gates.*gradient_checkpointing_disable", model, **inputs)
        with torch.no_grad():
            gated = model(**inputs)[0]
    model.gradient_checkpointing_disable()
    with rc_probe.ablate(model, part, inputs=inputs):
        assert torch.equal(model(**inputs)[0], gated)


def test_threads_and_data_parallel() -> None:
    model, inputs = zoo.build("bert")
    errors: list[BaseException] = []

    def run() -> None:
        try:
            model(**inputs)
        except rc_probe.RcProbeError as error:
            errors.append(error)

    for context in (rc_probe.ablate(model, "mlp@2", inputs=inputs), rc_probe.attach(model, inputs=inputs)):
        with suppress(rc_probe.RcProbeError), context:  # of the ablation no block ran
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
    assert len(errors) == 2 and all("another thread" in str(error) for error in errors)
    parallel = nn.DataParallel(model)
    survives(parallel, model, inputs)  # without GPUs it only calls the model
    parallel.device_ids = [0, 1]
    refuses("DataParallel: .*threads.*model.module", rc_probe.attach, parallel, inputs=inputs)
    refuses("DataParallel: .*threads.*model.module", measured, parallel)


# ---- the user's own modules


def encoder(norm_first: bool, batch_first: bool = True) -> nn.TransformerEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, norm_first=norm_first, batch_first=batch_first)
        model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=not norm_first).eval()
    randomise(model, torch.float32)
    return model


def by_hand(model: nn.TransformerEncoder, x: Tensor, off: int) -> Tensor:
    """The encoder without the MLP of layer `off`, from its parts."""
    for number, layer in enumerate(model.layers, 1):
        if layer.norm_first:
            x = x + layer._sa_block(layer.norm1(x), None, None)
            x = x if number == off else x + layer._ff_block(layer.norm2(x))
        else:
            x = layer.norm1(x + layer._sa_block(x, None, None))
            x = layer.norm2(x if number == off else x + layer._ff_block(x))
    return x


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_of_torch(norm_first: bool) -> None:
    """In evaluation torch fuses each layer to one call; inside a context it does not, and the two agree."""
    model, x = encoder(norm_first), torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    assert torch.backends.mha.get_fastpath_enabled()
    fused = model(x)
    with rc_probe.attach(model, mask=None, inputs={"src": x}) as probe:
        assert torch.allclose(model(x), fused, atol=1e-5)
    assert probe.structure.signature == ("A|M" if norm_first else "An|Mn")
    assert probe.frame()["count"].eq(2).all()
    with rc_probe.ablate(model, "mlp@2", inputs={"src": x}):
        gated = model(x)
    assert torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        wanted = by_hand(model, x, 2)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert torch.equal(gated, wanted)
    assert torch.equal(model(x), fused)
    refuses("heads cannot be gated", rc_probe.ablate, model, "head@1:1", inputs={"src": x})
    refuses("not a transformers model.*rc_probe.attach", rc_probe.probe, model, TEXTS)
    refuses("Give inputs=", rc_probe.attach, model)


def test_decoder_of_torch() -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2).eval()
    inputs = {"tgt": torch.randn(2, 7, 32), "memory": torch.randn(2, 5, 32)}
    assert rc_probe.attach(model, inputs=inputs).structure.signature == "An|Xn|Mn"
    survives(model, copy.deepcopy(model), inputs, ("cross@1", "mlp@2"))


class TimeFirst(nn.Module):
    """How to give a model that takes time first: samples come first at the outside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.transpose(0, 1))


@pytest.mark.parametrize("batch", [2, 3])
def test_time_first(batch: int) -> None:
    x = torch.randn(batch, 7, 32)
    model = encoder(False, batch_first=False)
    refuses("first axis", rc_probe.attach, model, inputs={"src": x.transpose(0, 1)})
    wrapped = TimeFirst(model)
    survives(wrapped, copy.deepcopy(wrapped), {"x": x}, ("mlp@2", "attention@1"))
    with torch.no_grad(), rc_probe.attach(wrapped, mask=None, inputs={"x": x}) as probe:
        wrapped(x)
    assert {b.batch_axis for b in probe.structure.blocks} == {1}


class Block(nn.Module):
    """Called by keyword, attention written out, a dict comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in "am")
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, *, stream: Tensor, scale: float) -> dict[str, Tensor]:
        B, T, D = stream.shape
        q, k, v = self.qkv(self.norms[0](stream)).view(B, T, 3, 4, D // 4).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT) * scale).softmax(-1) @ v  # (B, 4, T, D/4)
        stream = stream + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        return {"stream": stream + self.down(self.up(self.norms[1](stream)).relu())}


class Own(nn.Module):
    """A model without a config; its list of blocks goes by another name, its inputs by place or name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.trunk = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(32, 50)

    def forward(self, tokens: Tensor, scale: float = 0.3) -> Tensor:
        x = self.embed(tokens)
        for block in self.trunk:
            x = block(stream=x, scale=scale)["stream"]
        return self.head(x)


def test_a_module_of_the_users_own() -> None:
    model = Own().eval()
    inputs = {"tokens": torch.randint(50, (2, 9)), "scale": 0.2}
    survives(model, copy.deepcopy(model), inputs)
    with torch.no_grad():
        with rc_probe.ablate(model, "head@1:2", inputs=inputs):
            gated = model(inputs["tokens"], 0.2)  # by place
        cut = copy.deepcopy(model)
        cut.trunk[0].out.weight[:, 8:16] = 0
        assert torch.allclose(gated, cut(**inputs), atol=1e-6)
        with rc_probe.attach(model, inputs=inputs, mask=None) as probe:
            model(inputs["tokens"])
    assert probe.structure.signature == "A|M"
    assert [b.name for b in probe.structure.blocks] == ["trunk.0", "trunk.1"]
    refuses("Own: not a transformers model.*rc_probe.attach", rc_probe.probe, model, TEXTS)
    refuses("Own: no example input.*Give inputs=", rc_probe.attach, model)
    model.config = SimpleNamespace(vocab_size=50)  # a config that says little
    refuses("its forward pass fails.*input_ids", rc_probe.attach, model)


def test_operations_of_an_extension() -> None:
    """A linear map that torch knows nothing of counts as one; a silent add would hide the branch."""

    @torch.library.custom_op("rc_probe_tests::linear", mutates_args=())
    def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, w, b)

    class Extension(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.rc_probe_tests.linear(x, self.weight, self.bias)

    plain = Own().eval()
    model = copy.deepcopy(plain)
    for module in [m for m in model.modules() if type(m) is nn.Linear]:
        module.__class__ = Extension
    survives(model, plain, {"tokens": torch.randint(50, (2, 9))})


def test_contexts_closed_out_of_order_leave_compiled_graphs_in_use() -> None:
    model, inputs = zoo.build("bert")
    backend = Counting()
    model = compiled(model, "wrapped", backend)
    fused = torch.backends.mha.get_fastpath_enabled()
    first, second = (
        rc_probe.ablate(model, "mlp@1", inputs=inputs),
        rc_probe.ablate(model, "mlp@2", inputs=inputs),
    )
    first.__enter__()
    second.__enter__()
    with torch.no_grad():
        model(**inputs)
    assert not backend.graphs
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    with torch.no_grad():
        model(**inputs)
    assert backend.graphs > 0
    assert torch.backends.mha.get_fastpath_enabled() == fused
