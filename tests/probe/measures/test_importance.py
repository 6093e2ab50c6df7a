"""Importance: every removal against a copy of the model with the part taken out by hand, scored by plain loops."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from scipy.stats import t as student
from support import tiny, trained
from support.loops import numpy_residual

import rc_probe
from rc_probe import RcProbeError
from rc_probe.budget import Shape
from rc_probe.data.batches import batches
from rc_probe.data.samples import load_samples
from rc_probe.measures.importance import scored
from rc_probe.measures.importance.importance import affordable
from rc_probe.models.load import Loaded
from rc_probe.tasks import choose_task

TEXTS, KINDS = trained.walks(9, seed=5)
LESS: dict[str, Any] = {
    "init": False,
    "recursion": False,
    "paths": False,
    "metrics": ("residual",),
    "batch_size": 4,
}


def loaded(model: Any, processor: Any = None, modality: str = "text") -> Loaded:
    return Loaded(
        model.double().eval(), model.config, "tiny", None, modality, processor or trained.tokenizer()
    )


def make(kind: str) -> Loaded:
    torch.manual_seed(0)
    if kind == "bert":
        return loaded(tiny.bert("BertForMaskedLM", **trained.BERT))
    if kind in ("bert_labels", "bert_no_labels"):
        names = dict(enumerate(trained.STEPS))
        more = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
        return loaded(tiny.bert("BertForSequenceClassification", **trained.BERT, **more))
    if kind == "gpt2":
        config = transformers.GPT2Config(**trained.GPT2)
        return loaded(transformers.GPT2LMHeadModel(config), tiny.tokenizer(pad=False, special=False))
    if kind == "llama":
        config = transformers.LlamaConfig(**tiny.SIZES, num_key_value_heads=1, initializer_range=0.3)
        return loaded(transformers.LlamaForCausalLM(config), tiny.tokenizer(pad=False, special=False))
    if kind == "t5":
        config = transformers.T5Config(
            **tiny.T5_SIZES, pad_token_id=0, decoder_start_token_id=0, eos_token_id=2
        )
        return loaded(transformers.T5ForConditionalGeneration(config))
    assert kind == "vit"
    config = transformers.ViTConfig(**tiny.VIT_SIZES, num_labels=3, initializer_range=0.3)
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    return loaded(transformers.ViTForImageClassification(config), processor, "image")


def zeroed(*names: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name in names:
            for parameter in model.get_submodule(name).parameters():
                parameter.data.zero_()

    return change


def deleted(name: str, block: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        del model.get_submodule(name)[block]

    return change


def without_skip(name: str) -> Callable[[Any], None]:
    """BERT's output modules add and norm: LN(dense(x)) instead of LN(dense(x) + skip)."""

    def change(model: Any) -> None:
        own = model.get_submodule(name)
        own.forward = lambda x, skip: own.LayerNorm(own.dense(x))

    return change


def gpt2_head(model: Any) -> None:
    model.transformer.h[1].attn.c_proj.weight.data[16:] = 0  # head 2 of two, 16 wide


LAYER = "bert.encoder.layer"
BY_HAND: dict[str, dict[tuple[str, int, int | None], Callable[[Any], None]]] = {
    "bert": {
        ("block", 1, None): deleted(LAYER, 0),
        ("block", 2, None): deleted(LAYER, 1),
        ("attention", 1, None): zeroed(f"{LAYER}.0.attention.output.dense"),
        ("attention.skip", 2, None): without_skip(f"{LAYER}.1.attention.output"),
        ("mlp", 2, None): zeroed(f"{LAYER}.1.output.dense"),
        ("mlp.skip", 1, None): without_skip(f"{LAYER}.0.output"),
    },
    "bert_labels": {("block", 1, None): deleted(LAYER, 0), ("mlp", 1, None): zeroed(f"{LAYER}.0.output.dense")},
    "bert_no_labels": {("block", 2, None): deleted(LAYER, 1)},
    "gpt2": {
        ("block", 2, None): deleted("transformer.h", 1),
        ("head", 2, 2): gpt2_head,
    },
    "llama": {
        ("block", 1, None): deleted("model.layers", 0),
        ("attention", 2, None): zeroed("model.layers.1.self_attn.o_proj"),
        ("mlp", 1, None): zeroed("model.layers.0.mlp.down_proj"),
    },
    "t5": {
        ("block", 2, None): deleted("decoder.block", 1),
        ("attention", 1, None): zeroed("decoder.block.0.layer.0.SelfAttention.o"),
        ("cross", 2, None): zeroed("decoder.block.1.layer.1.EncDecAttention.o"),
        ("mlp", 2, None): zeroed("decoder.block.1.layer.2.DenseReluDense.wo"),
    },
    "vit": {
        ("block", 1, None): deleted("vit.layers", 0),
        ("attention", 2, None): zeroed("vit.layers.1.attention.o_proj"),
    },
}  # fmt: skip


def data_of(kind: str) -> Any:
    if kind == "vit":
        images = np.random.default_rng(0).integers(0, 255, (9, 8, 8, 3), dtype=np.uint8)
        return [Image.fromarray(one) for one in images]
    return TEXTS


def labels_of(kind: str) -> list[Any] | None:
    return {"vit": [0, 1, 2] * 3, "bert_labels": [trained.STEPS[i] for i in KINDS]}.get(kind)


@torch.no_grad()
def answers(model: Any, given: Loaded, kind: str) -> list[tuple[Any, Any]]:
    """For each sample by itself: log-probabilities (P, classes) at the scored places, and what is right there."""
    samples = load_samples(data_of(kind), modality=given.modality)
    task, _ = choose_task(given, replace(samples, labels=labels_of(kind)))
    found = []
    for batch in batches(task.samples, given, batch_size=1):
        prepared = task.prepare(batch)
        logits = model(**prepared.inputs).logits
        logits = logits[0, prepared.column] if prepared.column is not None else logits
        e = np.exp(logits.numpy() - logits.numpy().max(-1, keepdims=True))
        targets = None if prepared.targets is None else prepared.targets.numpy()
        found.append((np.log(e / e.sum(-1, keepdims=True)), targets))
    return found


def by_hand(plain: list[tuple[Any, Any]], other: list[tuple[Any, Any]]) -> dict[str, tuple[float, float]]:
    """Value without the part and that of the whole model, of each metric."""
    same = [np.mean(q.argmax(-1) == p.argmax(-1)) for (p, _), (q, _) in zip(plain, other, strict=True)]
    found = {"agreement": (float(np.mean(same)), 1.0)}
    if plain[0][1] is None:
        kl = [(np.exp(p) * (p - q)).sum(-1).mean() for (p, _), (q, _) in zip(plain, other, strict=True)]
        return found | {"kl": (float(np.mean(kl)), 0.0)}
    for name in ("accuracy", "loss"):
        both = []
        for version in (other, plain):
            if name == "loss":  # every token weighs the same
                picked = [-q[i, y] for q, targets in version for i, y in enumerate(targets)]
            else:  # every sample does
                picked = [float(np.mean(q.argmax(-1) == targets)) for q, targets in version]
            both.append(float(np.mean(picked)))
        found[name] = (both[0], both[1])
    return found


@pytest.mark.parametrize("kind", BY_HAND)
def test_it_is_what_a_model_without_the_part_loses(kind: str, tmp_path: Any) -> None:
    given = make(kind)
    labels: dict[str, Any] = {}
    data = data_of(kind)
    if labels_of(kind):
        import datasets

        column = "image" if kind == "vit" else "text"
        data = datasets.Dataset.from_dict({column: data, "label": labels_of(kind)})
        labels = {"label_column": "label"}
    wanted = {component for component, _, _ in BY_HAND[kind]}
    importance = "heads" if "head" in wanted else "parts" if wanted != {"block"} else "blocks"
    found = rc_probe.probe(
        given.model, data, processor=given.processor, importance=importance, **labels, **LESS
    )
    frame = found.tables["importance"]
    frame = frame[~frame["metric"].str.startswith("proxy_")]
    plain = answers(given.model, given, kind)
    for (component, block, head), change in BY_HAND[kind].items():
        model = copy.deepcopy(given.model)
        change(model)
        expected = by_hand(plain, answers(model, given, kind))
        at_head = frame["head"].isna() if head is None else frame["head"] == head
        rows = frame[(frame["component"] == component) & (frame["block"] == block) & at_head].set_index(
            "metric"
        )
        assert set(rows.index) == {*expected, "residual_bulk"}
        for metric, (value, baseline) in expected.items():
            row = rows.loc[metric]
            assert row["value"] == pytest.approx(value, abs=1e-9), (component, block, metric)
            assert row["baseline"] == pytest.approx(baseline, abs=1e-9), metric
            assert row["change"] == row["value"] - row["baseline"] and row["count"] == 9
    counts = {"blocks": 2, "heads": 6, "parts": {"t5": 14}.get(kind, 10)}
    assert len(frame.groupby(["component", "block", "head"], dropna=False)) == counts[importance]


def test_the_interval_is_paired_and_the_bulk_is_that_of_the_last_layer() -> None:
    """Of the token-weighted mean of differences; the residual from the hidden states of the masked texts."""
    given = make("bert")
    found = rc_probe.probe(given.model, TEXTS, processor=given.processor, importance="blocks", **LESS)
    rows = found.tables["importance"].query("component == 'block' and block == 1").set_index("metric")
    model = copy.deepcopy(given.model)
    deleted(LAYER, 0)(model)
    plain, other = answers(given.model, given, "bert"), answers(model, given, "bert")
    losses = [
        np.array([np.mean([-q[i, y] for i, y in enumerate(targets)]) for q, targets in version])
        for version in (other, plain)
    ]
    weights = np.array([len(targets) for _, targets in plain])
    x, n = losses[0] - losses[1], len(plain)
    mean = (weights * x).sum() / weights.sum()
    error = np.sqrt(n / (n - 1) * np.square(weights * (x - mean)).sum()) / weights.sum()
    half = student.ppf(0.975, n - 1) * error
    assert rows.loc["loss", ["change", "low", "high"]].tolist() == pytest.approx(
        [mean, mean - half, mean + half], abs=1e-9
    )
    assert rows.loc["loss", "low"] < 0 or rows.loc["loss", "low"] > 0
    task, _ = choose_task(given, load_samples(TEXTS, modality="text"))
    residuals = []
    for batch in batches(task.samples, given, batch_size=1):
        with torch.no_grad():
            states = model(**task.prepare(batch).inputs, output_hidden_states=True).hidden_states[-1]
        residuals.append(numpy_residual(states[0].numpy()))  # no token is massive behind a norm
    assert rows.loc["residual_bulk", "value"] == pytest.approx(np.mean(residuals), abs=1e-9)


def test_embeddings_are_compared_with_the_whole_model(demo: Loaded) -> None:
    """MiniLM: the nearest of the other halves, and 1 − cos to the whole model's embeddings."""
    texts = load_samples(None, modality="text", samples=4).items
    found = rc_probe.probe(
        demo.model, texts, processor=demo.processor, importance="blocks", length=32, **LESS
    )
    task, _ = choose_task(demo, load_samples(texts, modality="text"), length=32)
    model = copy.deepcopy(demo.model)
    del model.encoder.layer[2]
    both = []
    for version in (demo.model, model):
        vectors = []
        for batch in batches(task.samples, demo, length=32, batch_size=1):
            with torch.no_grad():
                mean = version(**batch.inputs).last_hidden_state[0].double().numpy().mean(0)
            vectors.append(mean / np.linalg.norm(mean))
        both.append(np.array(vectors))
    nearest = [(e[::2] @ e[1::2].T).argmax(1) for e in both]
    rows = (
        found.tables["importance"].query("component == 'block' and block == 3").set_index("metric")["value"]
    )
    assert found.importance is found.tables["importance"]
    assert rows["embedding_distance"] == pytest.approx(1 - (both[0] * both[1]).sum(1).mean(), abs=1e-6)
    assert rows["agreement"] == np.mean(nearest[0] == nearest[1])
    assert rows["accuracy"] == np.mean(nearest[1] == np.arange(4))
    assert found.verdict["importance"]["metric"] == "embedding_distance"


def test_proxies_by_plain_loops() -> None:
    """Of the plain pass: cosines and angles of each token before and behind a block, and its branches beside the stream."""
    given = make("bert")
    counts: list[tuple[int, int]] = []
    found = rc_probe.probe(
        given.model,
        TEXTS,
        processor=given.processor,
        importance="parts",
        progress=lambda _, *count: counts.append(count),
        **LESS,
    )
    assert (
        counts[-1][0] == counts[-1][1] == max(done for done, _ in counts)
    )  # the pass of the branches counts, too
    task, _ = choose_task(given, load_samples(TEXTS, modality="text"))
    wanted: dict[str, list[float]] = {name: [] for name in ("influence", "angle", "size", "cosine")}
    layer = given.model.bert.encoder.layer[1]
    caught: dict[str, Any] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: caught.update(entry=args[0])),
        layer.attention.output.dense.register_forward_hook(lambda _, args, out: caught.update(branch=out)),
        layer.register_forward_hook(lambda _, args, out: caught.update(leaves=out)),
    ]
    for batch in batches(task.samples, given, batch_size=1):
        with torch.no_grad():
            given.model(**task.prepare(batch).inputs)
        entry, branch, leaves = (caught[name][0].numpy() for name in ("entry", "branch", "leaves"))
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(entry, leaves, strict=True)]
        wanted["influence"].append(1 - np.mean(cosines))
        wanted["angle"].append(np.mean(np.arccos(cosines)) / np.pi)
        wanted["size"].append(
            np.mean([np.linalg.norm(b) / np.linalg.norm(a) for a, b in zip(entry, branch, strict=True)])
        )
        wanted["cosine"].append(
            np.mean(
                [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(entry, branch, strict=True)]
            )
        )
    for hook in hooks:
        hook.remove()
    frame = found.tables["importance"].query("block == 2").set_index(["component", "metric"])["value"]
    for component, metric, name in (
        ("block", "proxy_block_influence", "influence"), ("block", "proxy_angular_distance", "angle"),
        ("attention", "proxy_branch_norm", "size"), ("attention", "proxy_branch_cosine", "cosine"),
    ):  # fmt: skip
        assert frame[component, metric] == pytest.approx(np.mean(wanted[name]), abs=1e-9), metric


def test_a_block_behind_merged_tokens_has_no_proxy_and_a_note_says_so() -> None:
    sizes = {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
    }
    torch.manual_seed(0)
    model = transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, num_labels=3))  # type: ignore[arg-type]
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    noise = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    found = rc_probe.probe(
        model.eval(),
        [Image.fromarray(each) for each in noise],
        processor=processor,
        importance="blocks",
        **LESS,
    )
    table = found.tables["importance"]
    removed = ~table["metric"].str.startswith("proxy_")
    assert set(table[removed]["block"]) == {1, 2}
    assert set(table[~removed]["block"]) == {1}
    assert [note for note in found.model["notes"] if "block 2" in note] == [
        "No proxies of block 2: the stream has another shape behind than before, tokens merged."
    ]


def test_the_same_numbers_for_any_batch_size_and_by_full_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    from rc_probe import engine

    given = make("gpt2")
    tables = []
    for size in (1, 4, 9):
        found = rc_probe.probe(
            given.model, TEXTS, processor=given.processor, importance="heads", **LESS | {"batch_size": size}
        )
        tables.append(found.tables["importance"])
        monkeypatch.setattr(engine, "shortcut_problem", lambda *_: "for this test")
    for other in tables[1:]:
        assert other.drop(columns=["component", "metric"]).to_numpy() == pytest.approx(
            tables[0].drop(columns=["component", "metric"]).to_numpy(), abs=1e-9, nan_ok=True
        )


def test_it_is_measured_by_default_on_sixteen_samples() -> None:
    given = make("gpt2")
    texts, _ = trained.walks(17, seed=2)
    for count, parts in ((17, "blocks"), (15, "none")):
        found = rc_probe.probe(given.model, texts[:count], processor=given.processor, **LESS)
        assert found.settings["importance"] == parts
        assert ("importance" in found.tables) == (parts == "blocks")
    found = rc_probe.probe(given.model, texts, processor=given.processor, importance_samples=8, **LESS)
    assert set(found.tables["importance"]["count"]) == {8} and found.model["importance"]["samples"] == 8
    with pytest.raises(RcProbeError, match="importance: no parts are called 'layers'"):
        rc_probe.probe(given.model, texts, processor=given.processor, importance="layers", **LESS)


def test_it_is_cut_where_it_costs_too_much_and_a_number_that_was_given_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = make("gpt2")
    texts, _ = trained.walks(17, seed=2)
    monkeypatch.setattr("rc_probe.budget.LEAST", 0)
    monkeypatch.setattr("rc_probe.measures.importance.importance.PASSES", 2)
    found = rc_probe.probe(given.model, texts, processor=given.processor, **LESS)
    assert set(found.tables["importance"]["count"]) == {8} and found.model["importance"]["samples"] == 8
    (note,) = (note for note in found.model["notes"] if note.startswith("Importance: "))
    assert note.startswith(
        "Importance: on 8 of 16 samples, so that it costs no more than 2 plain passes over"
    )
    found = rc_probe.probe(given.model, texts, processor=given.processor, importance_samples=9, **LESS)
    assert set(found.tables["importance"]["count"]) == {9}
    assert not any(note.startswith("Importance: ") for note in found.model["notes"])


def test_what_is_affordable_by_hand() -> None:
    """weights 1000, 24 blocks 8 wide, 100 tokens: a pass of a sample is 100,000 + 2 · 24 · 8 · 100² = 3,940,000."""
    shape = Shape(1000, 24, 8, (2,) * 24, 100, 16, head=5000)
    one, head = 3_940_000 * 14, 25 * 5000 * 100
    assert 16 * (one + head) > 16 * 16 * 3_940_000 > 8 * (one + head)
    longer = replace(shape, samples=10**6)
    assert affordable(longer, 16, texts=True) == (16, 100)  # of so many samples a pass is worth more
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rc_probe.budget.LEAST", 0)
        assert affordable(shape, 16, texts=True) == (8, 100)
        assert affordable(replace(shape, head=0), 16, texts=True) == (16, 100)
        assert affordable(replace(shape, half=True), 16, texts=True) == (
            8,
            100,
        )  # four count as one on both sides
        assert affordable(replace(shape, samples=1), 16, texts=True) == (8, 25)
        assert affordable(replace(shape, samples=1), 16, texts=False) == (8, 100)


def test_scores_of_many_words_are_made_for_few_samples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given = make("gpt2")
    ask: dict[str, Any] = {"processor": given.processor, "importance": "blocks", **LESS}
    wanted = rc_probe.probe(given.model, TEXTS, **ask).tables["importance"]
    rows: list[int] = []
    given.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    tokens = batches(load_samples(TEXTS, modality="text"), given).longest
    monkeypatch.setattr(scored, "MEMORY", 2 * 4 * tokens * 32 + 1)  # of two texts of the longest
    found = rc_probe.probe(given.model, TEXTS, **ask | {"metrics": ("norm",)}).tables["importance"]
    assert rows.count(2) > len(TEXTS) // 2  # 9 texts are 5 batches, in 3 passes each
    numbers = ["value", "baseline", "change", "low", "high"]
    assert found[numbers].to_numpy() == pytest.approx(wanted[numbers].to_numpy(), abs=1e-9, nan_ok=True)


def test_a_removal_that_overflows_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its last block this model's head gets infinity."""
    given = make("gpt2")
    found = rc_probe.probe(given.model, TEXTS, processor=given.processor, importance="blocks", **LESS)
    from rc_probe.tasks.prediction import NextToken

    plain = NextToken.read
    seen: list[int] = []

    def broken(self: Any, output: Any, prepared: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:  # of the first batch: the plain pass, without block 1, without block 2
            raise RcProbeError("its head gives NaN or infinity", where="tiny")
        return plain(self, output, prepared)

    monkeypatch.setattr(NextToken, "read", broken)
    other = rc_probe.probe(given.model, TEXTS, processor=given.processor, importance="blocks", **LESS)
    kept = other.tables["importance"]
    assert set(kept[~kept["metric"].str.startswith("proxy_")]["block"]) == {1}
    wanted = found.tables["importance"].query("block == 1 and metric == 'loss'")["value"].tolist()
    assert kept.query("block == 1 and metric == 'loss'")["value"].tolist() == wanted
    assert "Not removed: block@2: tiny: its head gives NaN or infinity" in other.model["notes"]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_the_head_of_words_runs_at_the_scored_positions_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as with the whole head; how many positions it got is counted; nothing stays behind."""
    given = make(kind)
    head, sizes = given.model.get_output_embeddings(), list[tuple[int, ...]]()
    real = torch.nn.functional.linear

    def counted(x: Any, weight: Any, bias: Any = None) -> Any:
        if weight is head.weight:
            sizes.append(tuple(x.shape[:-1]))
        return real(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    ask: dict[str, Any] = {"processor": given.processor, "importance": "blocks", **LESS}
    narrow = rc_probe.probe(given.model, TEXTS, **ask).tables["importance"]
    scored = {size[1] for size in sizes if size[0] == 1 and len(size) == 2}
    monkeypatch.setattr("rc_probe.measures.importance.scored.narrow_head", lambda *_: None)
    whole = rc_probe.probe(given.model, TEXTS, **ask).tables["importance"]
    numbers = ["value", "baseline", "change", "low", "high"]
    assert narrow[numbers].to_numpy() == pytest.approx(whole[numbers].to_numpy(), abs=1e-12, nan_ok=True)
    task, _ = choose_task(given, load_samples(TEXTS, modality="text"))
    wanted = {len(task.prepare(batch).row) for batch in batches(task.samples, given, batch_size=4)}
    assert wanted <= scored
    assert not head._forward_pre_hooks


def test_what_stands_behind_the_head_may_want_all_of_it() -> None:
    """A model whose scores are changed by the place of a token, and one whose head somebody listens to: the whole head runs."""
    from rc_probe.tasks.narrow import narrow_head

    given = make("gpt2")
    task, _ = choose_task(given, load_samples(TEXTS, modality="text"))
    batch = next(iter(batches(task.samples, given)))
    assert narrow_head(task, task.prepare(batch)) is not None
    hook = given.model.get_output_embeddings().register_forward_hook(lambda *_: None)
    assert narrow_head(task, task.prepare(batch)) is None
    hook.remove()
    forward = given.model.forward

    def placed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(output.logits.shape[1])[:, None].double() * torch.arange(
            32
        )
        return output

    given.model.forward = placed
    assert narrow_head(task, task.prepare(batch)) is None
