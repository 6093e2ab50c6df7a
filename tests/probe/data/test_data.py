"""Samples: the right ones from each source, and one clear line for each that cannot be meant."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from huggingface_hub import constants
from PIL import Image

from rc_probe.data.samples import Samples, load_samples
from rc_probe.hooks.errors import RcProbeError

TEXTS = ["the first text", "a second one", "and a third"]


def load(spec: Any, modality: str = "text", **options: Any) -> Samples:
    return load_samples(spec, modality=modality, **options)


def refuses(spec: Any, *parts: str, modality: str = "text", **options: Any) -> None:
    with pytest.raises(RcProbeError) as caught:
        load(spec, modality, **options)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line


def picture(path: Path, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new(mode, size, 100).save(path)
    return path


def table(path: Path, columns: dict[str, list[Any]]) -> str:
    frame = pd.DataFrame(columns)
    if path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif path.suffix == ".json":
        frame.to_json(path, orient="records")
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return str(path)


# What comes with the package


def test_bundled_texts() -> None:
    samples = load(None)
    assert (samples.kind, samples.source, samples.note) == ("text", "bundled biographies", "")
    assert len(set(samples.items)) == 32 and all(len(text) > 300 for text in samples.items)
    assert load(None, samples=3).items == samples.items[:3]


def test_bundled_images() -> None:
    samples = load(None, "image", samples=16)
    assert (samples.kind, samples.source, len(samples.items)) == ("image", "bundled photographs", 16)
    assert samples.items == sorted(samples.items)
    assert load(None, "image", samples=20).note == "16 samples, not 20: there are no more"


# Files


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_tables(tmp_path: Path, suffix: str) -> None:
    texts = ['a comma, a "quote" and a tab\t.', "NA", "2024-01-01", "line\nbreak", "ünï"]
    path = table(tmp_path / f"data{suffix}", {"id": [1, 2, 3, 4, 5], "body": texts})
    samples = load(path)
    assert samples.items == texts
    assert path in samples.source
    assert load(path, column="body", samples=2).items == texts[:2]


def test_a_large_table_is_read_in_order_and_no_further(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": f"text number {i}"}) for i in range(1000)]
    path.write_text("\n".join([*lines[:600], "broken", *lines[600:]]))
    assert load(path, samples=600).items[-1] == "text number 599"
    refuses(path, "line 601", samples=601)
    frame = {"text": [f"text number {i}" for i in range(1000)]}
    for suffix in (".csv", ".parquet"):
        assert load(table(tmp_path / f"data{suffix}", frame), samples=999).items == frame["text"][:999]


@pytest.mark.parametrize(
    "found",
    [
        [{"text": text} for text in TEXTS],
        TEXTS,
        {"text": TEXTS, "label": [0, 1, 0]},
        {"data": [{"text": text} for text in TEXTS]},
    ],
)
def test_json_in_its_usual_forms(tmp_path: Path, found: Any) -> None:
    (tmp_path / "data.json").write_text(json.dumps(found))
    assert load(tmp_path / "data.json").items == TEXTS


def test_json_that_is_jsonl(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    assert load(tmp_path / "data.json").items == TEXTS


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"the first text\r\n\r\na second one\n  and a third \n\n")
    samples = load(path)
    assert samples.items == TEXTS and samples.source == f"{path} (lines)"


def test_paragraphs_of_wrapped_prose(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("It was late,\nand dark.\n\n\nA Title\n\nNobody spoke\nfor a while.\n")
    samples = load(path)
    assert samples.items == ["It was late, and dark.", "A Title", "Nobody spoke for a while."]
    assert samples.source == f"{path} (paragraphs)"
    long_lines = f"{'word ' * 30}\n{'word ' * 30}\n\n{'word ' * 30}\n{'word ' * 30}\n"
    path.write_text(long_lines)  # a text a line, in groups
    assert len(load(path).items) == 4


def test_one_long_text(tmp_path: Path) -> None:
    (tmp_path / "data.md").write_text("word " * 1000)
    samples = load(tmp_path / "data.md")
    assert len(samples.items) == 1 and "1 sample, not 32" in samples.note


def test_empty_and_short_texts_are_left_out_and_made_up_for() -> None:
    texts = ["", "one", "two words", "  ", "three words here", "x", "and the last"]
    samples = load(texts, samples=3, fits=lambda text: " " in text)
    assert samples.items == ["two words", "three words here", "and the last"]
    assert samples.note == "2 empty texts left out; 2 texts of fewer than two tokens left out"


# Images


def test_folder_of_images(tmp_path: Path) -> None:
    paths = [picture(tmp_path / name) for name in ("b.png", "a.jpg", "more/c.webp")]
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / ".hidden.png").write_text("nor this")
    assert load(tmp_path, "image").items == [paths[1], paths[0], paths[2]]
    assert load(str(paths[0]), "image").items == [paths[0]]


def test_broken_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not a picture")
    refuses(tmp_path, "a.png", "not a readable image", modality="image")


def test_list_of_images() -> None:
    images = [Image.new("L", (4, 4)), Image.new("RGB", (5, 5))]
    assert load(images, "image").items == images


# Python objects


def test_python_texts() -> None:
    assert load(TEXTS).items == TEXTS
    assert load(tuple(TEXTS)).items == TEXTS
    assert load((text for text in TEXTS), samples=2).items == TEXTS[:2]
    assert load(pd.Series(TEXTS)).items == TEXTS


def test_frame() -> None:
    frame = pd.DataFrame({"id": [1, 2, 3, 4], "text": [*TEXTS, None]}).astype({"text": object})
    samples = load(frame)
    assert samples.items == TEXTS and "1 empty texts" in samples.note
    assert load(pd.DataFrame({"id": [1.0, 2.0], "comment": ["aa bb", np.nan]})).items == ["aa bb"]


def test_dataset() -> None:
    dataset = datasets.Dataset.from_dict({"label": [0, 1, 0], "sentence": TEXTS, "other": TEXTS})
    assert load(dataset).items == TEXTS
    assert load(dataset.to_iterable_dataset(), samples=1).items == TEXTS[:1]
    refuses(datasets.DatasetDict(train=dataset, test=dataset), "several datasets", "train, test")
    images = datasets.Dataset.from_dict({"img": [Image.new("RGB", (3, 3))], "label": [0]})
    assert load(images, "image").items[0].size == (3, 3)


# Labels


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_labels_travel_with_their_samples(tmp_path: Path, suffix: str) -> None:
    columns = {"body": ["a b", "", "c d", "e", "f g"], "stars": [4, 1, 0, 2, 3], "mood": ["good", *"bcde"]}
    path = table(tmp_path / f"data{suffix}", columns)
    samples = load(path, label_column="stars", fits=lambda text: len(text) > 1, column="body")
    assert (samples.items, samples.labels) == (["a b", "c d", "f g"], [4, 0, 3])
    assert all(type(label) is int for label in samples.labels or [])
    assert load(path, label_column="mood", samples=2).labels == ["good", "c"]  # the text is the other column
    assert load(path, label_column="mood,stars", samples=1).labels == [("good", 4)]
    assert load(path, column="body").labels is None
    path = table(tmp_path / f"two{suffix}", {"mood": ["good", "bad"], "comment": ["a b", "c d"]})
    assert load(path, label_column="mood").items == ["a b", "c d"]  # the one that is left


def test_missing_labels_are_none(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", {"text": ["a", "b", "c"], "label": ["x", None, "y"]})
    assert load(path, label_column="label").labels == ["x", None, "y"]
    frame = pd.DataFrame({"text": ["a", "b"], "label": [1.0, np.nan]})
    assert load(frame, label_column="label").labels == [1.0, None]


def test_labels_of_datasets() -> None:
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
    )
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1, 1]}, features)
    for rows in (dataset, dataset.to_iterable_dataset()):
        samples = load(rows, label_column="label")
        assert (samples.labels, samples.classes) == ([0, 1, 1], ("no", "yes"))
    assert load(dataset).classes == ()
    frame = dataset.to_pandas()
    assert load(frame, label_column="label").labels == [0, 1, 1]
    images = datasets.Dataset.from_dict({"img": [Image.new("RGB", (3, 3))], "label": ["cat"]})
    assert load(images, "image", label_column="label").labels == ["cat"]


def test_labels_of_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "label": [2, 0, 1]}).to_iterable_dataset()
    monkeypatch.setattr("rc_probe.data.samples.hub_problem", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: dataset)
    assert load("a/b:test", label_column="label", samples=2).labels == [2, 0]
    refuses("a/b:test", "a/b", "no column 'labels'", "Did you mean 'label'?", label_column="labels")


def test_folders_name_classes(tmp_path: Path) -> None:
    """One of each folder in turn: the first samples are not all of the first class."""
    for name in ("dog/1", "cat/1", "cat/2", "cat/3", "train/bird/1"):
        picture(tmp_path / f"{name}.png")
    samples = load(tmp_path, "image", label_column="folder")
    assert samples.labels == ["cat", "dog", "bird", "cat", "cat"]
    assert [path.stem for path in samples.items] == ["1", "1", "1", "2", "3"]
    assert load(tmp_path, "image", label_column="folder", samples=2).labels == ["cat", "dog"]
    picture(tmp_path / "0.png")
    refuses(
        tmp_path, "no folder that could name them", "Put the files", modality="image", label_column="folder"
    )


def test_label_columns_that_are_not_there(tmp_path: Path) -> None:
    path = table(tmp_path / "data.csv", {"text": TEXTS, "label": [0, 1, 0]})
    refuses(path, "no column 'lable'", "Did you mean 'label'?", "text, label", label_column="lable")
    refuses(path, "no column 'score'", "The columns are text, label", label_column="text,score")
    (tmp_path / "data.txt").write_text("some words")
    for spec in (tmp_path / "data.txt", TEXTS, None):
        refuses(spec, "no columns here, so no 'label'", "Leave --label-column out", label_column="label")
    picture(tmp_path / "photos" / "a.png")
    photos = tmp_path / "photos"
    refuses(photos, "so no 'label'", "--label-column folder", modality="image", label_column="label")


# The Hub


def test_hub_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rc_probe.data.samples.hub_problem", lambda: "the Hugging Face Hub cannot be reached")
    monkeypatch.setattr(datasets, "load_dataset", pytest.fail)
    refuses("someone/some-data", "no such file or folder", "cannot be reached", "Give a .txt")


def test_hub_when_offline_by_will(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", pytest.fail)
    refuses("someone/some-data", "no such file or folder", "does not load", "name:config:split")


@pytest.mark.parametrize(
    ("spec", "asked", "source"),
    [
        ("a/b", ("a/b", None, None), "a/b:test"),
        ("a/b:test", ("a/b", None, "test"), "a/b:test"),
        ("a/b:large", ("a/b", "large", None), "a/b:large:test"),
        ("a/b:large:dev", ("a/b", "large", "dev"), "a/b:large:dev"),
        ("a/b::dev", ("a/b", None, "dev"), "a/b:dev"),
    ],
)
def test_hub_names(spec: str, asked: Any, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": text} for text in TEXTS]

    def load_dataset(name: str, config: str | None, *, split: str | None, streaming: bool) -> Any:
        assert streaming and (name, config, split) == asked
        return rows if split else {"train": [], "test": rows}

    monkeypatch.setattr("rc_probe.data.samples.hub_problem", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    samples = load(spec, samples=2)
    assert samples.items == TEXTS[:2] and samples.source == source


def test_hub_breaks_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        yield {"text": "a b"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr("rc_probe.data.samples.hub_problem", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows())
    assert load("a/b:train", samples=1).items == ["a b"]
    refuses("a/b:train", "reset by peer", "local file")


# What cannot be meant


def test_empty_sources(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.json", "a.csv"):
        (tmp_path / name).write_text("")
        refuses(tmp_path / name, name, "no texts in it")
    (tmp_path / "b.txt").write_text("\n \n\n")
    refuses(tmp_path / "b.txt", "no texts in it")
    (tmp_path / "b.csv").write_text("text\n")
    refuses(tmp_path / "b.csv", "no texts in it")
    refuses(table(tmp_path / "b.parquet", {"text": []}), "no texts in it")
    refuses([], "no texts in it")
    (tmp_path / "folder").mkdir()
    refuses(tmp_path / "folder", "no images in it", "folder of images", modality="image")


def test_only_short_texts() -> None:
    refuses(["a", "b"], "every text has fewer than two tokens", "longer texts", fits=lambda text: False)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_wrong_column(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"data{suffix}", {"sentence": TEXTS, "label": [0, 1, 0]})
    refuses(path, "no column 'sentense'", "Did you mean 'sentence'?", "sentence, label", column="sentense")
    refuses(path, "The columns are sentence, label", column="zzz")
    assert load(path, column="label").items == ["0", "1", "0"]  # digits are a text that was asked for


def test_column_that_is_not_obvious(tmp_path: Path) -> None:
    path = table(tmp_path / "data.csv", {"question": TEXTS, "answer": TEXTS})
    refuses(path, "several columns of texts", "--column", "question, answer")
    assert load(path, column="answer").items == TEXTS
    refuses(table(tmp_path / "numbers.csv", {"a": [1, 2]}), "no column of texts", "The columns are a")


def test_column_where_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("some words")
    picture(tmp_path / "photos" / "a.png")
    refuses(tmp_path / "data.txt", "no columns", "Leave --column out", column="text")
    refuses(tmp_path / "photos", "no columns", modality="image", column="text")
    refuses(TEXTS, "no columns", column="text")
    refuses(None, "no columns", column="text")


def test_nested_texts(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"text": [{"role": "user", "content": "hi"}]}\n')
    refuses(tmp_path / "chat.jsonl", "row 0 is a list")


def test_missing_files() -> None:
    for spec in ("nowhere.txt", "no/where.csv", "nowhere.parquet"):
        refuses(spec, spec, "no such file")
    for spec in ("./nowhere", "/no/where", "~/no-where-at-all", "a/b/c"):
        refuses(spec, spec, "no such file or folder")


def test_broken_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\x01")
    refuses(tmp_path / "a.txt", "not UTF-8")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}')
    refuses(tmp_path / "a.jsonl", "not UTF-8")
    (tmp_path / "b.jsonl").write_text('{"text": "a b"}\n{nope}\n')
    refuses(tmp_path / "b.jsonl", "line 2 is not JSON")
    (tmp_path / "c.jsonl").write_text("[1, 2]\n")
    refuses(tmp_path / "c.jsonl", "a row is a list")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    refuses(tmp_path / "a.parquet", "not a readable parquet file")
    (tmp_path / "a.csv").write_text('text,label\n"open\n')
    refuses(tmp_path / "a.csv", "not a readable csv file")
    (tmp_path / "b.csv").write_bytes(b"text\n\xff\xfe\n")
    refuses(tmp_path / "b.csv", "not a readable csv file")


def test_the_other_modality(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("some words")
    path = picture(tmp_path / "photos" / "a.png")
    refuses(tmp_path / "data.txt", "takes images", "folder of images", modality="image")
    refuses(tmp_path / "photos", "takes texts", ".jsonl")
    refuses(path, "takes texts")
    refuses(TEXTS, "row 0 is a str", "takes images", modality="image")
    refuses([Image.new("RGB", (2, 2))], "row 0 is a Image", "takes texts")
    refuses(["a b", 3], "row 1 is a int")
    refuses(7, "int holds no samples")


def test_names_with_markup_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "<b>x<b>.txt"
    path.write_text("<script>alert(1)</script> and more")
    assert load(path).items == ["<script>alert(1)</script> and more"]
    assert "<b>x<b>.txt" in load(path).source
