"""What is measured by default: how long paths are told apart, and how many samples go through the model together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import tiny, zoo

import rc_probe
from rc_probe.budget import Shape
from rc_probe.data.batches import Batch
from rc_probe.hooks.attach import find_structure
from rc_probe.models.load import Loaded
from rc_probe.paths import effectiveness
from rc_probe.paths.tables import affordable, path_rows, pattern_rows, with_longest
from rc_probe.settings import Settings


@pytest.mark.parametrize(
    ("given", "depth", "longest"),
    [(None, 12, None), (None, 13, 8), (None, 48, 8), (20, 48, 20), (3, 4, 3), (0, 13, 0)],
)
def test_what_is_longest_by_default(given: int | None, depth: int, longest: int | None) -> None:
    notes: list[str] = []
    assert with_longest(Settings(max_length=given), depth, notes).max_length == longest
    assert len(notes) == (given is None and depth > 12)
    assert all(f"longer than 8 are one part, since the model has {depth} blocks" in note for note in notes)


@pytest.mark.parametrize(("options", "most"), [({}, 9), ({"max_length": 13}, 13)])
def test_a_deep_model_has_one_part_for_its_longest_paths(options: dict[str, Any], most: int) -> None:
    torch.manual_seed(0)
    model = tiny.bert(num_hidden_layers=13).eval()
    result = rc_probe.probe(
        model, [tiny.words(6), tiny.words(5, 3), tiny.words(7, 5)], processor=tiny.tokenizer(), init=False,
        recursion=False, metrics=("residual",), **options,
    )  # fmt: skip
    alone = result.tables["paths"].query("scope == 'alone' and metric == 'projection'")
    assert alone["length"].tolist() == list(range(most + 1))
    assert sum(map(int, alone["count"])) == 3**13
    assert result.model["paths"]["max_length"] == (8 if not options else 13)
    assert any("longer than 8" in note for note in result.model["notes"]) == (not options)


def test_batches_of_paths_know_of_parts_and_of_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks, 32 wide, four heads; 2³⁰ bytes over eight times the numbers that one sample takes."""
    model, inputs = zoo.build("bert")[:2]
    structure = find_structure(model, inputs)
    one = Batch({"input_ids": inputs["input_ids"][:1]}, None)
    assert (structure.depth, structure.dim) == (3, 32)

    def rows(**options: Any) -> int:
        return path_rows(structure, Settings(**options), one)

    assert rows(length=512) == 2**30 // (8 * (4 * 5 * 512 * 32 + 4 * 4 * 512 * 512)) == 29
    assert rows(length=512, count_mlp=True) == 2**30 // (8 * (4 * 8 * 512 * 32 + 4 * 4 * 512 * 512))
    assert rows(length=512, max_length=0) == 2**30 // (8 * (4 * 3 * 512 * 32 + 4 * 4 * 512 * 512))
    assert rows(length=100_000) == 1
    assert pattern_rows(structure, Settings(length=512), one, 2**30) == 2**30 // (8 * 3 * 4 * 512 * 512) == 42
    image = zoo.build("vit")[:2]
    structure = find_structure(*image)
    numbers = 4 * 5 * 17 * 32 + 4 * 4 * 17 * 17  # 16 patches and the class token, whatever `length` says
    assert path_rows(
        structure, Settings(), Batch({k: v[:1] for k, v in image[1].items()}, None)
    ) == 2**30 // (8 * numbers)


def test_what_is_affordable() -> None:
    """Sixteen samples of usual models, with a head of many words or none; less of long texts, within eight plain passes."""
    base = Shape(85_054_464, 12, 768, (12,) * 12, 128, 32)
    assert affordable(base, 16, 14, cut=True) == (16, 128)
    assert affordable(replace(base, head=38_597_376), 16, 14, cut=True) == (16, 128)
    assert affordable(replace(base, samples=3), 3, 14, cut=True) == (3, 128)
    long = Shape(357_898_112, 24, 896, (14,) * 24, 1024, 4, 136_192_000)
    plain = [357_898_112 * t + 2 * 24 * 896 * t**2 for t in (1024, 512, 256)]
    costs = [4 * (p * 7.5 + 33 * 136_192_000 * t) for p, t in zip(plain, (1024, 512, 256), strict=True)]
    assert costs[2] <= 8 * 4 * plain[0] < costs[1]
    assert affordable(long, 4, 11, cut=True) == (4, 256)
    assert affordable(long, 4, 11, cut=False) == (1, 1024)
    half = [1.7 * 4 * (p * 7.5 + 33 * 136_192_000 * t) for p, t in ((plain[2] / 2, 128), (plain[2] / 4, 64))]
    assert half[1] < 8 * 7e11 < half[0], "a pass counts as some ten seconds at least"
    assert affordable(replace(long, half=True), 4, 11, cut=True) == (4, 64)
    assert affordable(replace(long, samples=16), 16, 11, cut=True) == (4, 1024), (
        "fewer samples before fewer tokens"
    )


def test_a_number_of_samples_that_is_asked_for_is_kept(demo: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rc_probe.budget.LEAST", 0)
    monkeypatch.setattr("rc_probe.paths.tables.PASSES", 4)
    how: dict[str, Any] = {"init": False, "recursion": False, "chains": False, "metrics": "residual"}
    texts = ["one two three four five six seven eight nine ten " * n for n in (4, 5, 4, 4, 5, 4)]
    cut = rc_probe.probe(demo.model, texts, processor=demo.processor, **how)
    assert cut.model["paths"]["samples"] == 4
    assert "Paths: on 4 of 6 samples, so that they cost no more than 4 plain" in " ".join(cut.model["notes"])
    kept = rc_probe.probe(demo.model, texts, processor=demo.processor, path_samples=6, **how)
    assert kept.model["paths"]["samples"] == 6 and not any(
        note.startswith("Paths") for note in kept.model["notes"]
    )


@pytest.mark.parametrize(
    ("options", "starts", "width"),
    [
        ({"length": 7}, 101, 5),
        ({"special_tokens": False}, 2023, 4),
        ({"length": 3, "special_tokens": False}, 2023, 3),
    ],
)
def test_paths_are_of_the_tokens_of_the_run(
    demo: Loaded, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], starts: int, width: int
) -> None:
    """What reaches the decomposition: [CLS] is 101 and "this" 2023; each half of a text has four words, or of the first five three and two."""
    seen: list[torch.Tensor] = []
    real = effectiveness.decompose

    def decomposed(structure: Any, inputs: dict[str, Any], **how: Any) -> Any:
        seen.append(inputs["input_ids"])
        return real(structure, inputs, **how)

    monkeypatch.setattr(effectiveness, "decompose", decomposed)
    texts = ["this cat runs to the house at night", "this dog sits by the river in rain"]
    rc_probe.probe(
        demo.model,
        texts,
        processor=demo.processor,
        init=False,
        recursion=False,
        chains=False,
        metrics=["residual"],
        **options,
    )
    assert {ids.shape[1] for ids in seen} == {width}
    assert {int(ids[0, 0]) for ids in seen} == {starts}
