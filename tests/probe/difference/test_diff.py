"""The difference of two models against float64, plain hooks and loops: streams, blocks, branches, predictions."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import tiny, two_models
from support.random_models import randomise
from support.two_models import TEXTS, bulk, encoded, gpt2, perturbed, recorded, relative, streams, values

import rc_probe
from rc_probe.difference.result import DiffResult
from rc_probe.hooks.errors import RcProbeError

METRICS = ["residual", "residual_bulk", "cosine", "norm", "effective_rank"]
FIRST = "transformer.h.1.mlp.c_proj.weight"


def diff(a: Any, b: Any, data: Any = TEXTS, **options: Any) -> DiffResult:
    options = {"processor": tiny.tokenizer(), "metrics": "residual", "batch_size": 3, **options}
    return rc_probe.diff(a, b, data, **options)


@pytest.fixture(scope="module")
def model() -> Any:
    return gpt2()


def images() -> list[Any]:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in noise]


def bert() -> tuple[Any, dict[str, Any]]:
    return tiny.bert("BertForMaskedLM"), {"processor": tiny.tokenizer(mask_token="w1")}


def t5() -> tuple[Any, dict[str, Any]]:
    config = transformers.T5Config(**tiny.T5_SIZES, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
    return transformers.T5ForConditionalGeneration(config), {}


def vit() -> tuple[Any, dict[str, Any]]:
    config = transformers.ViTConfig(**tiny.VIT_SIZES)
    size = {"height": 8, "width": 8}
    return transformers.ViTModel(config), {
        "data": images(),
        "processor": transformers.ViTImageProcessor(size=size),
    }


@pytest.mark.parametrize("build", [bert, t5, vit])
def test_a_model_is_no_different_from_itself(build: Any) -> None:
    """Exactly, with padded batches, masks, an encoder's states and pictures; as one object and as two."""
    made, options = build()
    randomise(made.eval(), torch.float32)
    for other in (made, copy.deepcopy(made)):
        found = diff(made, other, cka=True, **{"metrics": METRICS, "samples": 4, **options})
        rows = found.differences
        rest = rows[~rows["metric"].str.startswith(("cka", "agreement"))]
        assert (rest["mean"] == 0).all()
        assert {"stream", "block", "attention", "mlp", "predictions"} <= set(rows["component"])
        assert (rows[rows["metric"].str.startswith(("cka", "agreement"))]["mean"] == 1).all()
        assert found.verdict["sentence"].startswith("0 everywhere")
        assert "On the same inputs every block gives the same." in found.verdict["reasons"]


def test_streams_by_layer(model: Any) -> None:
    """Mean and standard deviation over samples, padding left out, and without massive tokens, that a table row makes."""
    a, b = copy.deepcopy(model), perturbed(model, "transformer.h.0.attn.c_proj.weight", 0.2)
    for one in (a, b):
        with torch.no_grad():
            one.transformer.wte.weight[8] *= 400  # w4
    found = diff(a, b)
    sides = [[streams(one, ids) for ids in encoded(TEXTS)] for one in (a, b)]
    hand = {"difference": [], "difference_bulk": []}
    for layer in range(4):
        pairs = [(x[layer], y[layer]) for x, y in zip(*sides, strict=True)]
        hand["difference"].append([relative(x, y) for x, y in pairs])
        hand["difference_bulk"].append([relative(x[bulk(x)], y[bulk(x)]) for x, y in pairs])
    assert any(not bulk(x[0]).all() for x in sides[0])
    assert hand["difference"][1] != hand["difference_bulk"][1]
    for metric, each in hand.items():
        rows = found.differences.query(f"component == 'stream' and metric == '{metric}'")
        assert rows["layer"].tolist() == [0, 1, 2, 3]
        np.testing.assert_allclose(rows["mean"], np.mean(each, 1), rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(rows["std"], np.std(each, 1, ddof=1), rtol=1e-4, atol=1e-9)
        assert rows["count"].tolist() == [4] * 4
    assert values(found, "stream", "difference")[0] == 0


def test_the_change_of_a_metric(model: Any) -> None:
    b = perturbed(model, FIRST, 0.3)
    plain = [rc_probe.probe(one, TEXTS, processor=tiny.tokenizer(), metrics="residual", init=False, recursion=False, paths=False)
             for one in (model, b)]  # fmt: skip
    means = [one.residuals.query("variant == 'transformer'")["mean"].to_numpy() for one in plain]
    found = diff(model, b, metrics="residual")
    np.testing.assert_allclose(values(found, "stream", "change_residual"), means[1] - means[0], atol=1e-7)


def test_one_block_is_named_and_its_size() -> None:
    """Weights of two branches of block 2 are off: by hand each part on what that of A got, in float64, text by text."""
    a = gpt2()
    b = perturbed(perturbed(a, FIRST, 0.05), "transformer.h.1.attn.c_proj.weight", 0.03)
    found = diff(a, b)
    hand: dict[str, list[float]] = {"block": [], "attention": [], "mlp": []}
    one, other = copy.deepcopy(a).double(), copy.deepcopy(b).double()
    inside = [
        {"block": m.transformer.h[1], "attention": m.transformer.h[1].attn, "norm": m.transformer.h[1].ln_2, "mlp": m.transformer.h[1].mlp}
        for m in (one, other)
    ]  # fmt: skip
    for ids in encoded(TEXTS):
        with torch.no_grad(), recorded(inside[0]) as seen:
            one(ids)

        def given(name: str, args: Any, seen: dict[str, Any] = seen) -> Any:
            return (torch.tensor(seen["block.in"])[None], *args[1:]) if name == "block" else args

        with torch.no_grad(), recorded(inside[1], given) as there:
            other(ids)
            mlp = other.transformer.h[1].mlp(
                other.transformer.h[1].ln_2(torch.tensor(seen["norm.in"])[None])
            )[0]
        hand["block"].append(relative(seen["block"], there["block"]))
        hand["attention"].append(relative(seen["attention"], there["attention"], seen["norm.in"]))
        hand["mlp"].append(relative(seen["mlp"], mlp.numpy(), seen["norm.in"] + seen["mlp"]))
    for part, each in hand.items():
        first, second, third = values(found, part, "sensitivity")
        assert first == third == 0
        assert second == pytest.approx(np.mean(each), rel=1e-3)
        assert min(each) > 1e-3
    assert values(found, "stream", "difference")[:2] == [0, 0]
    assert values(found, "stream", "difference")[3] > 0
    assert any(
        each.startswith("On the same inputs block 2 differs most") for each in found.verdict["reasons"]
    )


def test_an_error_within_a_block_is_not_that_of_the_next_branch() -> None:
    found = diff(gpt2(), perturbed(gpt2(), "transformer.h.1.attn.c_proj.weight", 0.1))
    assert values(found, "attention", "sensitivity")[1] > 0
    assert values(found, "mlp", "sensitivity") == [0, 0, 0]


def test_a_decoder_gets_the_encoder_states_of_the_first() -> None:
    """An encoder that is off is not the doing of the decoder's blocks."""
    a, _ = t5()
    randomise(a.eval(), torch.float32)
    b = perturbed(a, "encoder.block.0.layer.1.DenseReluDense.wo.weight", 0.3)
    found = diff(a, b)
    assert values(found, "stream", "difference")[1] > 0
    for part in ("block", "attention", "cross", "mlp"):
        assert values(found, part, "sensitivity") == [0, 0]
    found = diff(a, perturbed(a, "decoder.block.1.layer.1.EncDecAttention.o.weight", 0.3))
    assert values(found, "cross", "sensitivity")[0] == 0 < values(found, "cross", "sensitivity")[1]
    assert values(found, "mlp", "sensitivity") == [0, 0]


def test_loss_and_agreement(model: Any) -> None:
    """Token-weighted, at every real token that has one before it; special tokens are not predicted."""
    b = perturbed(model, FIRST, 0.5)
    found = diff(model, b)
    right, same, losses = 0, list[float](), list[list[float]]()
    for ids in encoded(TEXTS):
        logits = [copy.deepcopy(one).double()(ids).logits[0, :-1] for one in (model, b)]
        plain = torch.tensor([int(token) not in (0, 1, 2, 3) for token in ids[0, 1:]])
        one, other = (x.log_softmax(-1)[torch.arange(len(plain)), ids[0, 1:]][plain] for x in logits)
        losses.append([float(-one.sum()), float(-other.sum()), int(plain.sum())])
        same.append(float((logits[0].argmax(-1) == logits[1].argmax(-1))[plain].double().mean()))
        right += int(plain.sum())
    total = np.sum(losses, 0)
    assert values(found, "predictions", "change_loss")[0] == pytest.approx(
        (total[1] - total[0]) / total[2], rel=1e-4
    )
    assert values(found, "predictions", "agreement") == [pytest.approx(np.mean(same))]
    told = found.settings["predictions"]
    assert (told["task"], told["samples"], told["predictions"]) == ("next token", 4, right)
    assert told["loss"]["a"] == pytest.approx(total[0] / total[2], rel=1e-5)


def test_cka_of_other_widths_and_of_other_depths(model: Any) -> None:
    """By NumPy over all real tokens of all samples at once; layer l beside the layer of the same relative depth."""
    narrow, short = gpt2(width=8), gpt2(layers=2, seed=1)
    for other, partners in ((narrow, [0, 1, 2, 3]), (short, [0, 1, 1, 2])):
        found = diff(model, other)
        sides = [[streams(one, ids) for ids in encoded(TEXTS)] for one in (model, other)]
        for layer, partner in enumerate(partners):
            x, y = (
                np.concatenate([s[at] for s in side])
                for side, at in zip(sides, (layer, partner), strict=True)
            )
            x, y = x - x.mean(0), y - y.mean(0)
            wanted = np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
            assert values(found, "stream", "cka")[layer] == pytest.approx(wanted, rel=1e-5)
        assert not values(found, "stream", "difference")
        assert set(found.differences["component"]) == {"stream", "predictions"}
        assert any("Sensitivities were not measured" in note for note in found.settings["notes"])
    assert any("layer round(l · 2 / 3)" in note for note in found.settings["notes"])
    assert found.verdict["sentence"].endswith("layer 1.") or "linear CKA" in found.verdict["sentence"]


@pytest.mark.parametrize("first", [True, False])
def test_layers_of_a_pruned_model_correspond_by_their_blocks(model: Any, first: bool) -> None:
    """Without block 2, layer 1 is layer 1, exactly, and layer 3 of the whole is layer 2 of the rest."""
    rest = gpt2(layers=2)
    weights = {name: x for name, x in model.state_dict().items() if "h.1." not in name}
    rest.load_state_dict({name.replace("h.2.", "h.1."): x for name, x in weights.items()})
    found = diff(model, rest) if first else diff(rest, model)
    last = [[streams(one, ids)[at] for ids in encoded(TEXTS)] for one, at in ((model, 3), (rest, 2))]
    wanted = np.mean([relative(x, y) for x, y in zip(*(last if first else last[::-1]), strict=True)])
    rows = found.differences.query("component == 'stream' and metric == 'difference'")
    assert rows["layer"].tolist() == ([0, 1, 3] if first else [0, 1, 2])
    assert rows["mean"].tolist() == [0, 0, pytest.approx(wanted, rel=1e-5)]
    assert not values(found, "stream", "cka") and not values(found, "block", "sensitivity")


def test_the_first_layer_over_the_threshold(model: Any) -> None:
    b = perturbed(model, FIRST, 0.3)
    sizes = values(diff(model, b), "stream", "difference_bulk")
    assert sizes[2] > 0
    found = diff(model, b, threshold=sizes[2] * 0.99)
    assert (found.verdict["first"], found.verdict["threshold"]) == (2, sizes[2] * 0.99)
    assert diff(model, b, threshold=10).verdict["first"] is None


def test_dtypes_attention_and_adapters(model: Any, tmp_path: Any) -> None:
    """bfloat16 is off everywhere by its rounding, another attention by that of float32; an adapter where its weights are."""
    place = tiny.saved(tmp_path / "m", model, tiny.tokenizer())
    half = rc_probe.diff(place, place, TEXTS, dtype="float32", dtype_b="bfloat16", metrics="residual")
    assert half.b["dtype"] == "bfloat16"
    assert all(2e-4 < x < 2e-2 for x in values(half, "block", "sensitivity"))
    eager = rc_probe.diff(place, place, TEXTS, attention_b="eager", metrics="residual")
    assert (eager.a["attention"], eager.b["attention"]) == ("sdpa", "eager")
    assert max(values(eager, "stream", "difference")) < 1e-6
    assert eager.b["name"] == "m (eager)"
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_proj"], layers_to_transform=[2], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    found = diff(model, adapted)
    assert values(found, "block", "sensitivity")[:2] == [0, 0]
    assert values(found, "attention", "sensitivity")[2] > 0 < values(found, "mlp", "sensitivity")[2]
    with adapted.disable_adapter():
        assert max(values(diff(model, adapted), "block", "sensitivity")) == 0


def test_int8_weights_are_those_written_out(model: Any, tmp_path: Any) -> None:
    """torchao's int8 weights against a model whose weights are rounded by hand: one scale for each row."""
    pytest.importorskip("torchao")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SIZES, attention_bias=True)).eval()
    randomise(llama, torch.float32)
    place = tiny.saved(tmp_path / "m", llama, tiny.tokenizer())
    found = rc_probe.diff(place, place, TEXTS, quantise_b="int8-weights", metrics="residual")
    assert (found.a["dtype"], found.b["dtype"]) == ("float32", "float32, Int8Tensor")
    rounded = copy.deepcopy(llama)
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            weight = module.weight.data
            scale = weight.abs().amax(1, keepdim=True) / 127.5
            module.weight.data = (weight / scale).round().clamp(-128, 127) * scale
    wanted = diff(llama, rounded)
    for part in ("block", "attention", "mlp"):
        np.testing.assert_allclose(
            values(found, part, "sensitivity"), values(wanted, part, "sensitivity"), rtol=0.05
        )
    assert values(found, "block", "sensitivity")[0] > 1e-3


def test_what_cannot_be_compared_is_refused(model: Any, tmp_path: Any) -> None:
    place = tiny.saved(tmp_path / "m", model, tiny.tokenizer())
    other = tiny.saved(tmp_path / "other", model, tiny.tokenizer(special=False))
    picture, options = vit()
    with pytest.raises(RcProbeError, match="make other tokens of text 0"):
        rc_probe.diff(place, other, TEXTS)
    with pytest.raises(RcProbeError, match="first model takes texts and the second images"):
        rc_probe.diff(place, picture, TEXTS, processor_b=options["processor"])
    smaller = transformers.ViTModel(transformers.ViTConfig(**tiny.VIT_SIZES | {"patch_size": 2}))
    with pytest.raises(RcProbeError, match=r"has 17 tokens at layer 0, that of .* 5"):
        diff(picture, smaller, images(), processor=options["processor"])
    bad = options["processor"].__class__(size={"height": 8, "width": 8}, do_normalize=False)
    with pytest.raises(RcProbeError, match="are given other pixel_values"):
        diff(picture, copy.deepcopy(picture), images(), processor=options["processor"], processor_b=bad)
    broken = copy.deepcopy(model)
    broken.transformer.h[1].mlp.c_proj.bias.data[0] = 3e38
    broken.transformer.h[1].mlp.c_fc.bias.data[:] = 3e38
    with pytest.raises(RcProbeError, match=r"NaN or infinity|NaN"):
        diff(model, broken)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype_b": "float12"}, "dtype_b: no such dtype"),
        ({"quantise_b": "int3"}, "quantise_b: nothing is called 'int3'"),
        ({"threshold": 0}, "threshold: 0 is no threshold"),
        ({"metrics": "residul"}, "Did you mean 'residual'"),
        ({"attention_b": "eager"}, "attention_b: it says how a model is loaded, and this one is"),
        ({"init": True}, "no option is called 'init'"),
        ({"processor": 3}, "processor: int is none"),
        ({"processor_b": "bert"}, "processor_b: str is none"),
        ({"progress": 3}, "progress: int is none"),
    ],
)
def test_wrong_options(model: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(RcProbeError, match=said):
        diff(model, model, **options)


def test_saved_and_loaded(model: Any, tmp_path: Any) -> None:
    found = diff(model, perturbed(model, FIRST, 0.2))
    found.save(tmp_path / "d")
    back = DiffResult.load(tmp_path / "d")
    assert back.differences.equals(found.differences)
    assert back.source == tmp_path / "d" / "results.json"  # so that a damaged one is one line
    assert (back.a, back.b, back.settings, back.verdict) == (found.a, found.b, found.settings, found.verdict)
    assert {path.name for path in (tmp_path / "d").iterdir()} == {
        "report.html", "results.json", "differences.csv",
    }  # fmt: skip
    with pytest.raises(RcProbeError, match="a difference, not a run"):
        rc_probe.ProbeResult.load(tmp_path / "d")
    assert two_models.values(back, "block", "sensitivity")[1] > 0
