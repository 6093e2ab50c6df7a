"""The memorize experiment: sentences, labels by chance, and the ceiling without positions."""

from collections import Counter
from pathlib import Path

import pytest
import torch

import rc_probe.experiments
from rc_probe import RcProbeError
from rc_probe.experiments.labelling.data import Labelled
from rc_probe.experiments.memorize import EXPERIMENT, MOST, guesses, memorize_data, sentences, vocabulary
from rc_probe.models.own.san import SANConfig

TEXTS = ["The cat saw the dog.", "A dog!", "the the the"]


def test_words_and_masks() -> None:
    assert vocabulary(TEXTS) == {
        "[PAD]": 0,
        "[UNK]": 1,
        "!": 2,
        ".": 3,
        "a": 4,
        "cat": 5,
        "dog": 6,
        "saw": 7,
        "the": 8,
    }
    data = memorize_data(TEXTS, seed=0)
    assert data.inputs["input_ids"].tolist() == [[8, 5, 7, 8, 6, 3], [4, 6, 2, 0, 0, 0], [8, 8, 8, 0, 0, 0]]
    assert data.inputs["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert [[label >= 0 for label in row] for row in data.labels.tolist()] == [
        [True] * 6,
        *[[True] * 3 + [False] * 3] * 2,
    ]
    assert set(data.labels.flatten().tolist()) == {-100, 0, 1}


def test_the_bundled_sentences_have_labels_by_chance() -> None:
    texts = sentences(120)
    assert len(texts) == len(set(texts)) == 120 and all(text[-1] in ".!?" for text in texts)
    data, same, other = (memorize_data(texts, seed=seed) for seed in (0, 0, 1))
    assert data.labels[data.labels >= 0].double().mean() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(data.labels, same.labels) and not torch.equal(data.labels, other.labels)
    assert data.inputs["input_ids"].shape[1] <= MOST


def test_guesses_by_counting() -> None:
    """The ceiling: equal words of a sentence get one answer, the commoner of their labels."""
    data = memorize_data(sentences(30), seed=0)
    words, labels = data.inputs["input_ids"].tolist(), data.labels.tolist()
    real = [
        (s, w, y)
        for s, (ws, ys) in enumerate(zip(words, labels, strict=True))
        for w, y in zip(ws, ys, strict=True)
        if y >= 0
    ]
    ours = [one for one in real if one[0] < 10]

    def best(key: slice) -> float:
        """Each sentence weighs alike; ties go to 0, as in the experiment."""
        counts = Counter((one[key], one[2]) for one in real)
        right = [
            [int(counts[one[key], 1] > counts[one[key], 0]) == one[2] for one in ours if one[0] == s]
            for s in range(10)
        ]
        return sum(sum(one) / len(one) for one in right) / 10

    assert list(guesses(data, 10).values()) == pytest.approx(
        [best(slice(0, 0)), best(slice(1, 2)), best(slice(0, 2))]
    )


def test_the_ceiling_of_a_sentence_by_hand() -> None:
    ids = torch.tensor([[1, 1, 1, 2], [1, 2, 0, 0]])
    data = Labelled({"input_ids": ids}, torch.tensor([[1, 1, 0, 0], [0, 1, -100, -100]]))
    # Ties go to 0. All labels: 3 of 6 are 1; word 1: 1 1 0 0; word 2: 0 1. So the first two guess 0: half of both sentences.
    # The ceiling: of the first sentence 3 of 4 (word 1 is 1 1 0, word 2 is 0), of the second all.
    assert list(guesses(data, 2).values()) == pytest.approx([0.5, 0.5, (3 / 4 + 1) / 2])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EXPERIMENT, "quick", EXPERIMENT.sizes.changed(seeds=1, epochs=1, train=8, test=4))

    def config(train: Labelled) -> SANConfig:
        words = int(train.inputs["input_ids"].max()) + 1
        return SANConfig(
            vocab_size=words, hidden_size=8, num_hidden_layers=2, max_position_embeddings=0, num_labels=2
        )

    monkeypatch.setattr(EXPERIMENT, "config", config)


@pytest.mark.usefixtures("small")
def test_texts_of_the_user_are_memorized(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(f"Text number {i} of a few words" for i in range(6)))
    home, data = tmp_path / "found", str(tmp_path / "texts.txt")
    found = rc_probe.experiments.run("memorize", quick=True, data=data, device="cpu", out=home)
    assert found.settings["command"].endswith(f"--quick --data {tmp_path / 'texts.txt'} --device cpu")
    ceiling = found.tables["baselines"].set_index("baseline")["accuracy"]["ceiling without positions"]
    assert ceiling == 1  # no word stands twice in a text
    rows = found.tables["paths"].query("metric == 'accuracy'")
    whole = rows.query("estimator == 'full'")["mean"].item()
    assert found.claims.loc[0, "measured"] == pytest.approx(1 - whole)
    texts = (home / "seed-0" / "texts.txt").read_text().splitlines()
    probed = rc_probe.probe(
        str(home / "seed-0" / "model"), [*texts, "an unknown word"], init=False, metrics=("residual",)
    )
    assert (len(texts), probed.settings["tokens"]) == (6, 6 * 7 + 3)
    assert probed.settings["missing"] == {}, (
        "its mask has one row for all queries, and its samples other lengths"
    )
    kept = home / "seed-0" / "measured.json"
    before = kept.stat().st_mtime_ns
    assert rc_probe.experiments.run("memorize", quick=True, data=data, device="cpu", out=home).claims.equals(
        found.claims
    )
    assert kept.stat().st_mtime_ns == before
    (tmp_path / "texts.txt").write_text("\n".join(f"Another text {i} of some words" for i in range(6)))
    rc_probe.experiments.run("memorize", quick=True, data=data, device="cpu", out=home)
    assert kept.stat().st_mtime_ns > before, "the file has other texts"
    with pytest.raises(RcProbeError, match="2 texts are too few to memorize"):
        rc_probe.experiments.run("memorize", quick=True, data=["one text", "two texts"], device="cpu")
