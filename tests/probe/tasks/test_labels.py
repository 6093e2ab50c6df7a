"""Labels as a model's classes: by name, by number, and one line for each that cannot be meant."""

from typing import Any

import pytest
import transformers
from support import trained

from rc_probe.data.samples import Samples
from rc_probe.hooks.errors import RcProbeError
from rc_probe.models.load import Loaded
from rc_probe.tasks import choose_task
from rc_probe.tasks.labels import class_numbers, kind_of

CONFIG = transformers.BertConfig(id2label={0: "Negative", 1: "neutral", 2: "Positive"})
PLAIN = transformers.BertConfig(num_labels=3)  # LABEL_0, LABEL_1, LABEL_2


def samples(labels: list[Any], classes: tuple[str, ...] = (), kind: str = "text") -> Samples:
    return Samples(kind, "data.csv", ["a b"] * len(labels), "", labels, classes)


@pytest.mark.parametrize(
    ("labels", "classes", "config", "expected"),
    [
        ([2, 0, 1], (), CONFIG, [2, 0, 1]),
        ([2.0, False, True], (), CONFIG, [2, 0, 1]),
        (["Positive", "negative", "NEUTRAL"], (), CONFIG, [2, 0, 1]),
        (["2", "0"], (), CONFIG, [2, 0]),
        (["label_1", "LABEL_2"], (), PLAIN, [1, 2]),
        # A dataset that counts the classes otherwise: its names win, if the model knows them all.
        ([0, 1, 2], ("positive", "negative", "neutral"), CONFIG, [2, 0, 1]),
        ([0, 1], ("positive", "negative"), CONFIG, [2, 0]),
        ([0, 1, 2], ("positive", "negative", "mixed"), CONFIG, [0, 1, 2]),
        ([0, 1, 2], ("positive", "negative", "neutral"), PLAIN, [0, 1, 2]),
    ],
)
def test_classes(labels: list[Any], classes: tuple[str, ...], config: Any, expected: list[int]) -> None:
    assert class_numbers(samples(labels, classes), config) == expected


@pytest.mark.parametrize(
    ("labels", "classes", "says"),
    [
        (
            [0, -1],
            (),
            "data.csv: the label '-1' of sample 1 is none of the model's 3 classes. Give one of Negative, neutral, "
            "Positive or a number from 0 to 2, or leave --label-column out",
        ),
        ([3], (), "the label '3' of sample 0 is none"),
        ([-1], ("positive", "negative", "neutral"), "the label '-1' of sample 0 is none"),
        ([1.5], (), "the label '1.5' of sample 0 is none"),
        ([float("inf")], (), "the label 'inf' of sample 0 is none"),
        (["good"], (), "the label 'good' of sample 0 is none"),
        ([[1, 2]], (), "the label '[1, 2]' of sample 0 is none"),
        ([1, None], (), "data.csv: sample 1 has no label. Leave such rows out"),
    ],
)
def test_classes_that_are_none(labels: list[Any], classes: tuple[str, ...], says: str) -> None:
    with pytest.raises(RcProbeError) as caught:
        class_numbers(samples(labels, classes), CONFIG)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "kind", "expected"),
    [
        (["one text", "another", "a third", "a third"], "text", "pair"),
        (["pos", "neg", "pos", "neg"], "text", "class"),
        (["cat", "dog", "bird"], "image", "class"),
        ([0, 1, 1], "text", "class"),
        ([("one", 0.5), ("two", 1)], "text", "similarity"),
    ],
)
def test_what_labels_are_for_without_a_head(labels: list[Any], kind: str, expected: str) -> None:
    assert kind_of(samples(labels, kind=kind)) == expected


def test_one_class_is_noted(trained_classifier: Loaded) -> None:
    texts, kinds = trained.walks(4)
    given = Samples("text", "here", texts, "", ["two"] * 4)
    assert choose_task(trained_classifier, given)[1] == [
        "All samples have the same label, so that accuracy says little."
    ]
    given = Samples("text", "here", texts, "", [trained.STEPS[kind] for kind in kinds])
    task, notes = choose_task(trained_classifier, given)
    assert task is not None and task.labels == kinds and notes == []  # type: ignore[attr-defined]
