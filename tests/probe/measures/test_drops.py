"""What can go: the search against brute force on copies of the model, and every form against the gated model."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from support import tiny, trained

import rc_probe
from rc_probe import RcProbeError
from rc_probe.data.batches import batches
from rc_probe.data.samples import load_samples
from rc_probe.measures.drops import emission
from rc_probe.models.load import Loaded, load_model
from rc_probe.result import ProbeResult
from rc_probe.results.findings.limits import parse_limit

TEXTS, _ = trained.walks(8, seed=5)
LESS: dict[str, Any] = {
    "init": False,
    "recursion": False,
    "paths": False,
    "metrics": ("residual",),
    "importance": "none",
}


def llama(layers: int = 4) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **tiny.SIZES | {"num_hidden_layers": layers}, num_key_value_heads=1, initializer_range=0.3
    )
    return transformers.LlamaForCausalLM(config).eval()


def probed(model: Any, processor: Any = None, texts: list[str] = TEXTS, **options: Any) -> ProbeResult:
    return rc_probe.probe(
        model, texts, processor=processor or tiny.tokenizer(pad=False, special=False), **LESS, **options
    )


@torch.no_grad()
def loss(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Of the next token, every token alike; each text by itself."""
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        logs = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        found += [-float(logs[i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1)]
    return float(np.mean(found))


def without(model: Any, *blocks: int) -> Any:
    """A copy of a Llama without these blocks, from 1."""
    other = copy.deepcopy(model)
    other.model.layers = torch.nn.ModuleList(
        each for i, each in enumerate(other.model.layers, 1) if i not in blocks
    )
    return other


def test_each_step_is_the_best_of_all_and_held_out_samples_score_it() -> None:
    """Four blocks: each removal tried on a copy, on every second text; the list scored on the others."""
    model, tokenizer = llama(), tiny.tokenizer(pad=False, special=False)
    found = probed(model, drop=3)
    rows = found.tables["drops"].query("metric == 'loss'")
    greedy = rows.query("method == 'greedy'")
    gone: list[int] = []
    for step in (1, 2, 3):
        costs = {
            n: loss(without(model, *gone, n), tokenizer, TEXTS[::2]) for n in range(1, 5) if n not in gone
        }
        gone.append(min(costs, key=lambda n: costs[n]))
        here = greedy.query(f"step == {step}").set_index("split")
        assert here.loc["chosen", "block"] == gone[-1] == here.loc["held_out", "block"]
        assert here.loc["chosen", "value"] == pytest.approx(costs[gone[-1]], abs=1e-5)
        assert here.loc["held_out", "value"] == pytest.approx(
            loss(without(model, *gone), tokenizer, TEXTS[1::2]), abs=1e-5
        )
        assert here.loc["held_out", "baseline"] == pytest.approx(
            loss(model, tokenizer, TEXTS[1::2]), abs=1e-5
        )
    single = {
        pair: loss(without(model, *pair), tokenizer, TEXTS[::2])
        for pair in itertools.combinations(range(1, 5), 1)
    }
    assert greedy["block"].iloc[0] == min(single, key=lambda pair: single[pair])[0]
    random = rows.query("method == 'random' and split == 'held_out'")
    for _, own in random.groupby("draw"):
        assert own["step"].tolist() == [1, 2, 3] and own["block"].is_unique
        wanted = [loss(without(model, *own["block"][:n]), tokenizer, TEXTS[1::2]) for n in (1, 2, 3)]
        assert own["value"].tolist() == pytest.approx(wanted, abs=1e-5)
    last = rows.query("split == 'chosen' and step == 3")
    best = last.loc[last["value"].idxmin()]
    assert found.model["drops"]["method"] == best["method"]
    assert found.model["drops"]["samples"] == {"chosen": 4, "held_out": 4}


def test_the_window_of_least_angular_distance() -> None:
    """By plain loops over the hidden states of the texts that choose."""
    model, tokenizer = llama(), tiny.tokenizer(pad=False, special=False)
    streams: list[list[Any]] = []
    caught: list[Any] = []
    layers = model.model.layers
    hooks = [layer.register_forward_pre_hook(lambda _, args: caught.append(args[0])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda _, args, out: caught.append(out)))
    for text in TEXTS[::2]:
        caught.clear()
        with torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"), use_cache=False)
        streams.append([x[0].double().numpy() for x in caught])
    for hook in hooks:
        hook.remove()
    rows = (
        probed(model, drop=2)
        .tables["drops"]
        .query("method == 'angular' and split == 'chosen' and metric == 'loss'")
    )
    for length in (1, 2):
        distances = {}
        for start in range(5 - length):
            each = []
            for x in streams:
                pairs = zip(x[start], x[start + length], strict=True)
                each.append(
                    np.mean(
                        [np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) / np.pi for a, b in pairs]
                    )
                )
            distances[start + 1] = np.mean(each)
        best = min(distances, key=lambda start: distances[start])
        row = rows.query(f"step == {length}").iloc[0]
        assert row["block"] == best
        gone = range(best, best + length)
        assert row["value"] == pytest.approx(loss(without(model, *gone), tokenizer, TEXTS[::2]), abs=1e-5)


@pytest.fixture(scope="module")
def padded(trained_causal: Loaded) -> Any:
    """The trained decoder of two blocks, with three more that do nothing: blocks 1, 3 and 5 of five."""
    model = copy.deepcopy(trained_causal.model)
    blocks = []
    for block in model.transformer.h:
        inert = copy.deepcopy(block)
        for projection in (inert.attn.c_proj, inert.mlp.c_proj):
            for parameter in projection.parameters():
                parameter.data.zero_()
        blocks += [inert, block]
    blocks.append(copy.deepcopy(blocks[0]))
    model.transformer.h = torch.nn.ModuleList(blocks)
    model.config.n_layer = 5
    for number, block in enumerate(blocks):
        block.attn.layer_idx = number
    return model


def test_blocks_that_do_nothing_go_first_and_cost_nothing(padded: Any) -> None:
    found = probed(padded, drop=4, texts=trained.walks(16, seed=9)[0])
    rows = found.tables["drops"].query("method == 'greedy' and metric == 'loss'")
    for split in ("chosen", "held_out"):
        own = rows.query(f"split == '{split}'")
        assert own["block"].tolist()[:3] == [1, 3, 5]
        assert own["change"].tolist()[:3] == [0, 0, 0] and own["change"].iloc[3] > 0.1
        assert own["low"].tolist()[:3] == own["high"].tolist()[:3] == [0, 0, 0]
    until = probed(padded, drop_until="loss>+0.1", texts=trained.walks(16, seed=9)[0])
    assert until.model["drops"]["from_1"] == {"block": [1, 3, 5]} and until.model["drops"]["removed"] == 3
    assert "Without blocks 1, 3 and 5 the loss changes by 0 nats" in until.verdict["drops"]["sentence"]


def test_branches_alone(padded: Any) -> None:
    found = probed(padded, drop=7, drop_parts=("attention", "mlp"), texts=trained.walks(16, seed=9)[0])
    rows = found.tables["drops"].query("method == 'greedy' and split == 'chosen' and metric == 'loss'")
    assert [*zip(rows["component"], rows["block"], strict=True)][:6] == [
        (part, block) for block in (1, 3, 5) for part in ("attention", "mlp")
    ]
    assert rows["change"].tolist()[:6] == [0] * 6
    facts = found.model["drops"]
    assert "angular" not in set(found.tables["drops"]["method"])
    assert facts["refused"] == "these forms drop whole blocks, not branches alone" and "forms" not in facts
    assert facts["from_1"]["attention"][:1] == [1] and facts["ablate"].startswith("attention@1,3")


# ---- what builds the smaller model


def build(config: Any, cls: Any, state: dict[str, Any], stack: str, kept: list[int]) -> Any:
    """A new model of the kept blocks, from the weights of the old one."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = len(kept)
    model, mine = cls(config).eval(), {}
    for name, value in state.items():
        if name.startswith(f"{stack}."):
            number, _, rest = name.removeprefix(f"{stack}.").partition(".")
            if int(number) in kept:
                mine[f"{stack}.{kept.index(int(number))}.{rest}"] = value
        else:
            mine[name] = value
    model.load_state_dict(mine)
    return model


@pytest.mark.parametrize(
    ("kind", "stack"), [("llama", "model.layers"), ("bert", "bert.encoder.layer"), ("gpt2", "transformer.h")]
)
def test_every_form_builds_the_gated_model(kind: str, stack: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    if kind == "llama":
        model, processor = llama(), tiny.tokenizer(pad=False, special=False)
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**trained.GPT2 | {"n_layer": 4})).eval()
        processor = tiny.tokenizer(pad=False, special=False)
    else:
        model = tiny.bert("BertForMaskedLM", **trained.BERT | {"num_hidden_layers": 4}).eval()
        processor = trained.tokenizer()
    folder = tiny.saved(tmp_path / "model", model, processor)
    loaded = load_model(folder)
    before = copy.deepcopy(loaded.config.to_dict())
    found = rc_probe.probe(loaded.model, TEXTS, processor=loaded.processor, drop=2, **LESS)
    facts = found.model["drops"]
    gone = facts["from_0"]["block"]
    assert [n - 1 for n in facts["from_1"]["block"]] == gone and len(gone) == 2
    assert loaded.model.config.to_dict() == before and len(loaded.model.get_submodule(stack)) == 4
    inputs = processor(TEXTS[0], return_tensors="pt")
    with torch.no_grad(), rc_probe.ablate(loaded.model, facts["ablate"], inputs=dict(inputs)):
        gated = loaded.model(**inputs).logits
    forms = facts["forms"]
    assert set(forms) == {"transformers", "mergekit", *(() if kind == "bert" else ("llama.cpp",))}
    space: dict[str, Any] = {}
    assert repr(folder) in forms["transformers"]
    exec(forms["transformers"], space)
    space["model"].save_pretrained(tmp_path / "smaller")
    state = loaded.model.state_dict()
    merge = yaml.safe_load(forms["mergekit"])
    assert merge["merge_method"] == "passthrough"
    assert {part["sources"][0]["model"] for part in merge["slices"]} == {folder}
    kept = [i for part in merge["slices"] for i in range(*part["sources"][0]["layer_range"])]
    built = [
        space["model"].eval(), type(model).from_pretrained(tmp_path / "smaller").eval(),
        build(loaded.config, type(model), state, stack, kept),
    ]  # fmt: skip
    if kind != "bert":
        numbers = forms["llama.cpp"].split("--prune-layers ")[1].split()[0]
        left = [i for i in range(4) if str(i) not in numbers.split(",")]
        built.append(build(loaded.config, type(model), state, stack, left))
    for other in built:
        with torch.no_grad():
            assert torch.allclose(other(**inputs).logits, gated, atol=1e-6)
    if kind != "bert":
        row = found.tables["drops"].query("metric == 'loss' and split == 'chosen' and step == 2")
        row = row[row["method"] == facts["method"]]
        assert loss(built[0], processor, TEXTS[::2]) == pytest.approx(row["value"].min(), abs=1e-5)


def test_shared_blocks_are_measured_and_not_written() -> None:
    torch.manual_seed(0)
    config = transformers.AlbertConfig(**trained.BERT | {"num_hidden_layers": 3, "embedding_size": 16})
    found = probed(transformers.AlbertForMaskedLM(config).eval(), trained.tokenizer(), drop=1)
    facts = found.model["drops"]
    assert facts["refused"].startswith("its blocks share their weights: one module (albert.encoder")
    assert "is called 3 times" in facts["refused"] and "forms" not in facts and len(found.tables["drops"]) > 0
    assert any(
        reason.startswith("No smaller model is written: its blocks share")
        for reason in found.verdict["drops"]["reasons"]
    )


def test_a_smaller_model_with_other_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emission, "CLOSE", -1.0)
    model = llama()
    layers = list(model.model.layers)
    facts = probed(model, drop=1).model["drops"]
    assert facts["refused"].startswith("the smaller model gives other numbers than the gated one")
    assert list(model.model.layers) == layers and model.config.num_hidden_layers == 4
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]


# ---- what is asked for


def test_embeddings_are_dropped_by_their_distance(demo: Loaded) -> None:
    texts = load_samples(None, modality="text", samples=8).items
    found = rc_probe.probe(demo.model, texts, processor=demo.processor, length=24, drop=1, **LESS)
    assert found.model["drops"]["criterion"] == "embedding_distance"
    row = (
        found.tables["drops"]
        .query("method == 'greedy' and split == 'held_out' and metric == 'embedding_distance'")
        .iloc[0]
    )
    model = copy.deepcopy(demo.model)
    del model.encoder.layer[int(row["block"]) - 1]
    from rc_probe.tasks import choose_task

    task, _ = choose_task(demo, load_samples(texts[1::2], modality="text"), length=24)
    vectors = []
    for version in (demo.model, model):
        means = []
        for batch in batches(task.samples, demo, length=24, batch_size=1):
            with torch.no_grad():
                means.append(version(**batch.inputs).last_hidden_state[0].double().mean(0))
        vectors.append(torch.nn.functional.normalize(torch.stack(means), dim=-1))
    assert row["value"] == pytest.approx(1 - float((vectors[0] * vectors[1]).sum(-1).mean()), abs=1e-6)


def test_limits() -> None:
    assert parse_limit("loss>+0.1").passed(3.11, 3.0) and not parse_limit("loss>+0.1").passed(3.09, 3.0)
    assert parse_limit("accuracy < -0.05").passed(0.7, 0.8) and not parse_limit("accuracy<0.5").passed(
        0.7, 0.8
    )
    for text, says in (
        ("loss", "drop_until loss: it is not a limit"), ("los>+1", "parts are not dropped by 'los'"),
        ("loss>+x", "'x' is not a number"), ("loss>nan", "'nan' is not a number"),
    ):  # fmt: skip
        with pytest.raises(RcProbeError, match=says.replace("+", r"\+")):
            probed(llama(2), drop_until=text)


def test_what_cannot_be_dropped_is_refused_before_any_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rc_probe.engine.Passes", None)
    model = llama(2)
    for options, says in (
        ({"drop": 2}, "2 cannot go: it has 2 parts of the kind block. Give at most 1"),
        ({"drop": 1, "drop_parts": ("block", "mlp")}, "a block holds its branches"),
        ({"drop": 1, "drop_parts": ("layers",)}, "no parts are called 'layers'"),
    ):
        with pytest.raises(RcProbeError, match=says):
            probed(model, **options)
    with pytest.raises(RcProbeError, match=r"nothing says what a removal costs\. There are too few samples"):
        probed(model, drop=1, texts=TEXTS[:1])


def test_where_the_first_removal_is_too_much_nothing_goes() -> None:
    found = probed(llama(2), drop_until="agreement<2")
    assert found.model["drops"]["removed"] == 0 and "drops" not in found.tables
    sentence = found.verdict["drops"]["sentence"]
    assert sentence == "Nothing can go: the first removal already has agreement<2."
    assert f'<p class="finding">{sentence.replace("<", "&lt;")}</p>' in found.to_html()
