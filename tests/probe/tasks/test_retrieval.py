"""Embeddings: pooling, retrieval, pairs and similarities against numpy and scipy."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from scipy.stats import spearmanr
from support import tiny

from rc_probe.data.batches import batches
from rc_probe.data.samples import Samples, load_samples
from rc_probe.hooks.errors import RcProbeError
from rc_probe.models.load import Loaded, load_model
from rc_probe.tasks import FULL, Tally, Task, choose_task
from rc_probe.tasks.choose import halves
from rc_probe.tasks.retrieval import Embedding, pool

TEXTS = [tiny.words(count, step) for step, count in ((1, 12), (3, 5), (5, 9), (7, 9), (2, 4))]


@pytest.fixture(scope="module")
def bert() -> Loaded:
    torch.manual_seed(0)
    model = tiny.bert(initializer_range=0.5).eval()
    return Loaded(model, model.config, "tiny", None, "text", tiny.tokenizer())


def samples(texts: list[str] | None = None, labels: list[Any] | None = None) -> Samples:
    return replace(load_samples(texts or TEXTS, modality="text", samples=1000), labels=labels)


def chosen(loaded: Loaded, given: Samples) -> Task:
    task, _ = choose_task(loaded, given)
    assert task is not None
    return task


@torch.no_grad()
def tally(loaded: Loaded, task: Task, batch_size: int = 3) -> Tally:
    """The model itself; "half", the first dimensions of its states only; "none", all states the same."""
    found = task.tally()
    for batch in batches(task.samples, loaded, batch_size=batch_size):
        prepared = task.prepare(batch)
        output = task.model(**prepared.inputs)
        states = task.head(output)
        found.start(prepared, output)
        found.add("half", states * (torch.arange(states.shape[-1]) < 3))
        found.add("none", torch.zeros_like(states))
    return found


@torch.no_grad()
def embeddings(loaded: Loaded, texts: list[str], kept: int | None = None) -> Any:
    """(N, dim) by numpy, each text by itself: the mean over its tokens, of length 1."""
    found = []
    for text in texts:
        ids = loaded.processor(text, return_tensors="pt").input_ids
        mean = loaded.model(input_ids=ids).last_hidden_state[0].double().numpy().mean(0)[:kept]
        found.append(mean / np.linalg.norm(mean))
    return np.array(found)


def test_halves_of_texts_find_each_other(bert: Loaded) -> None:
    task = chosen(bert, samples())
    assert (task.name, task.metrics) == ("retrieval", ("agreement", "accuracy"))
    cut = [halves(text) for text in TEXTS]
    assert task.samples.items == [half for pair in cut for half in pair]
    for size in (1, 3, 8):
        found = tally(bert, task, size)
        scores = found.scores()
        nearest: dict[Any, Any] = {}
        for key, kept in ((FULL, None), ("half", 3)):
            ones, others = (embeddings(bert, [pair[i] for pair in cut], kept) for i in (0, 1))
            nearest[key] = (ones @ others.T).argmax(1)
            assert scores[key]["accuracy"].tolist() == (nearest[key] == np.arange(5)).tolist()
            assert scores[key]["agreement"].tolist() == (nearest[key] == nearest[FULL]).tolist()
        most = max(Counter(nearest[FULL].tolist()).values())
        assert found.baselines() == {"agreement": most / 5, "accuracy": 1 / 5}
        assert scores["none"]["accuracy"].tolist() == [1, 0, 0, 0, 0]  # chance
    assert 0 < scores["half"]["agreement"].mean() < 1


def test_halves_are_those_of_what_the_run_reads(bert: Loaded) -> None:
    """Texts of 16, 12, 10, … tokens with the two special ones, of which a run reads 12 or 8."""
    for length, special in itertools.product((12, 8), (True, False)):
        task, _ = choose_task(bert, samples(), length=length, special_tokens=special)
        assert isinstance(task, Embedding)
        read = [" ".join(text.split()[: length - 2 * special]) for text in TEXTS]
        assert [text.split() for text in task.samples.items] == [
            half.split() for text in read for half in halves(text)
        ]


def test_demo_finds_most(demo: Loaded) -> None:
    task, notes = choose_task(demo, load_samples(None, modality="text"))
    assert task is not None
    assert notes == [
        "Embeddings are pooled from the last hidden state (mean as its 1_Pooling/config.json says)."
    ]
    found = tally(demo, task, 16)
    assert found.scores()[FULL]["accuracy"].mean() == 25 / 32 and found.baselines()["accuracy"] == 1 / 32


def test_order_of_batches_is_of_no_matter(bert: Loaded) -> None:
    task = chosen(bert, samples())
    made = list(batches(task.samples, bert, batch_size=3))
    expected, found = tally(bert, task).scores()[FULL], task.tally()
    with torch.no_grad():
        for batch in made[::-1]:
            found.start(task.prepare(batch), bert.model(**batch.inputs))
    assert torch.equal(found.scores()[FULL]["accuracy"], expected["accuracy"])
    parts = [task.tally(), task.tally()]  # as two processes have them
    with torch.no_grad():
        for i, batch in enumerate(made):
            parts[i % 2].start(task.prepare(batch), bert.model(**batch.inputs))
    parts[0].merge(parts[1])
    assert torch.equal(parts[0].scores()[FULL]["accuracy"], expected["accuracy"])


def test_cutting_texts() -> None:
    assert halves("one two three four") == ("one two", "three four")
    assert halves("一二三四五六") == ("一二三", "四五六")
    assert halves("a 一二三四五六七八九") == ("a 一二三", "四五六七八九")
    assert halves("word") == ("wo", "rd")


def test_texts_too_short_to_halve(bert: Loaded) -> None:
    options = {"special_tokens": False}
    task, notes = choose_task(bert, samples(["w1 w2", TEXTS[0], TEXTS[1]]), **options)  # type: ignore[arg-type]
    assert task is not None and len(task.samples.items) == 4
    assert "1 pairs with a text of fewer than two tokens left out." in notes
    task, _ = choose_task(bert, samples(TEXTS[:3], labels=["w1 w2", "w1", "w2 w3"]), **options)  # type: ignore[arg-type]
    assert task is not None and task.samples.items == [TEXTS[0], "w1 w2", TEXTS[2], "w2 w3"]
    task, notes = choose_task(bert, samples(TEXTS[:1]))
    assert task is None and notes == ["Nothing was scored: retrieval needs at least 2 texts."]


# Labels


def test_paired_texts(bert: Loaded) -> None:
    others = [tiny.words(4, step) for step in (2, 4, 6, 8)] + [tiny.words(4, 2)]  # the last is the first
    task = chosen(bert, samples(labels=others))
    assert task.metrics == ("agreement", "accuracy")
    found = tally(bert, task)
    nearest = (embeddings(bert, TEXTS) @ embeddings(bert, others).T).argmax(1)
    right = [others[i] == others[j] for i, j in enumerate(nearest)]
    assert found.scores()[FULL]["accuracy"].tolist() == right
    assert found.baselines()["accuracy"] == pytest.approx((1 + 1 + 1 + 2 + 2) / 25)


def test_similarity_of_pairs(bert: Loaded) -> None:
    others, given = [tiny.words(4, step) for step in (2, 4, 6, 8, 9)], [0.5, 4, 2.5, 0, 4]
    task = chosen(bert, samples(labels=list(zip(others, given, strict=True))))
    assert task.metrics == ("agreement", "spearman")
    found = tally(bert, task)
    scores = found.scores()
    for key, kept in ((FULL, None), ("half", 3)):
        cosines = (embeddings(bert, TEXTS, kept) * embeddings(bert, others, kept)).sum(1)
        expected = spearmanr(cosines, given).statistic
        assert scores[key]["spearman"].tolist() == pytest.approx([expected])
    assert abs(scores[FULL]["spearman"].item()) > 0.05
    assert scores["none"]["spearman"].tolist() == [0]  # no order, no correlation, no NaN
    assert found.baselines()["spearman"] == 0 and scores[FULL]["agreement"].shape == (5,)


def test_classes_without_a_head(bert: Loaded) -> None:
    labels = ["a", "b", "a", "b", "b"]
    task = chosen(bert, samples(labels=labels))
    cosines = embeddings(bert, TEXTS) @ embeddings(bert, TEXTS).T
    np.fill_diagonal(cosines, -2)
    found = tally(bert, task)
    expected = [labels[i] == labels[j] for i, j in enumerate(cosines.argmax(1))]
    assert found.scores()[FULL]["accuracy"].tolist() == expected
    assert found.baselines()["accuracy"] == pytest.approx((2 * 1 + 3 * 2) / 20)  # of the ordered pairs


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0.5, 1.5, 2, 3, 4], r"the label 0\.5 of sample 0 is no class of texts.*--label-column TEXT,SCORE"),
        ([("w1", 1.0)] * 4 + [("w1", "much")], r"\('w1', 'much'\) of sample 4 is not a text and a number"),
        ([(1.0, 2.0)] * 5, "of sample 0 is not a text and a number"),
        ([("w1", None)] * 5, "sample 0 has no label. Leave such rows out"),
        (["a", "b", None, "a", "b"], "sample 2 has no label"),
    ],
)
def test_labels_of_no_use(bert: Loaded, labels: list[Any], says: str) -> None:
    with pytest.raises(RcProbeError, match=says):
        choose_task(bert, samples(labels=labels))


# Pooling


@pytest.mark.parametrize("mode", ["cls", "max", "mean", "weightedmean", "lasttoken"])
def test_pooling(mode: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 6, 4, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 1, 4])[:, None]
    hidden[1, 1:] = torch.nan  # padding has no say
    found = pool(hidden, mask, [mode])
    for i, length in enumerate((6, 1, 4)):
        x = hidden[i, :length].numpy()
        weights = np.arange(1, length + 1)
        expected = {
            "cls": x[0], "max": x.max(0), "mean": x.mean(0), "lasttoken": x[-1],
            "weightedmean": (x * weights[:, None]).sum(0) / weights.sum(),
        }  # fmt: skip
        np.testing.assert_allclose(found[i], expected[mode], atol=1e-14)
    left = hidden.flip(1), mask.flip(1)
    np.testing.assert_allclose(pool(*left, ["cls"]), pool(hidden, mask, ["lasttoken"]))
    assert torch.equal(pool(hidden, mask, ["cls", "max"])[:, 4:], pool(hidden, mask, ["max"]))


@pytest.mark.parametrize(
    ("config", "pooling", "says"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",), "first token as its"),
        ({"pooling_mode_lasttoken": True}, ("lasttoken",), "last token as its 1_Pooling/config.json says"),
        (
            {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
            ("max", "mean"),
            "max and mean as",
        ),
        ({"pooling_mode": "max"}, ("max",), "(max as"),
        ({}, ("mean",), "state (mean)."),
        (None, ("mean",), "state (mean)."),
        ("broken", ("mean",), "state (mean)."),
    ],
)
def test_pooling_of_the_checkpoint(tmp_path: Path, config: Any, pooling: tuple[str, ...], says: str) -> None:
    folder = tiny.saved(tmp_path, tiny.bert(), tiny.tokenizer())
    if config is not None:
        (tmp_path / "1_Pooling").mkdir()
        text = "{broken" if config == "broken" else json.dumps(config)
        (tmp_path / "1_Pooling" / "config.json").write_text(text)
    task, notes = choose_task(load_model(folder, device="cpu"), samples())
    assert task is not None and task.pooling == pooling and says in notes[-1]  # type: ignore[attr-defined]


# Images


def images(count: int) -> Samples:
    return load_samples(
        [Image.effect_noise((8, 8), 10 + 40 * i) for i in range(count)], modality="image", samples=99
    )


@pytest.mark.parametrize("name", ["ViT", "PoolFormer"])
def test_images_find_the_nearest(name: str) -> None:
    torch.manual_seed(0)
    sizes = {
        "ViT": tiny.VIT_SIZES,
        "PoolFormer": {"hidden_sizes": [8, 8], "depths": [1, 1], "num_encoder_blocks": 2},
    }
    if name == "PoolFormer":
        sizes[name] |= {"patch_sizes": [2, 2], "strides": [2, 2], "padding": [0, 0]}  # type: ignore[operator]
    model = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**sizes[name])
    ).eval()
    processor = transformers.ViTImageProcessorPil(size={"height": 8, "width": 8})
    loaded = Loaded(model, model.config, name, None, "image", processor)
    given = images(6)
    task = chosen(loaded, given)
    assert task.metrics == ("agreement",) and task.samples is given
    found = task.tally()
    with torch.no_grad():
        states = []
        for batch in batches(given, loaded, batch_size=4):
            output = model(**batch.inputs)
            found.start(task.prepare(batch), output)
            found.add(
                "twist", output.last_hidden_state * torch.linspace(-1, 2, output.last_hidden_state.shape[-1])
            )
            states.append(output.last_hidden_state.double().numpy())
    whole = np.concatenate(states)

    def nearest(x: Any) -> Any:
        mean = x.mean((2, 3)) if x.ndim == 4 else x.mean(1)
        mean = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        cosines = mean @ mean.T
        np.fill_diagonal(cosines, -2)
        return cosines.argmax(1)

    twist = nearest(whole * np.linspace(-1, 2, whole.shape[-1]))
    assert found.scores()["twist"]["agreement"].tolist() == (twist == nearest(whole)).tolist()
    assert found.scores()[FULL]["agreement"].tolist() == [1] * 6
    assert found.baselines() == {"agreement": max(Counter(nearest(whole).tolist()).values()) / 6}
    task, notes = choose_task(loaded, images(2))  # type: ignore[assignment]
    assert task is None and "at least 3 images" in notes[0]


def test_numbers_that_are_none(bert: Loaded) -> None:
    task = chosen(bert, samples())
    (batch, *_) = batches(task.samples, bert)
    states = bert.model(**batch.inputs).last_hidden_state.detach()
    states[0, 0] = torch.inf
    with pytest.raises(RcProbeError, match="BertModel: its last hidden state holds NaN or infinity"):
        task.read(states, task.prepare(batch))
