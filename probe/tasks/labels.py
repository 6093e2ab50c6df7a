"""What a label column says: numbers of a model's classes, the other halves of pairs, or how alike these are."""

from __future__ import annotations

from typing import Any

from rc_probe.data.samples import Samples
from rc_probe.hooks.errors import RcProbeError
from rc_probe.results.words import THINGS

SHOWN = 8  # names of classes in an error


def class_numbers(samples: Samples, config: Any) -> list[int]:
    """The model's class of each sample: by name where the model knows the name, else by number.

    Numbers that the dataset has names for are taken by these, if the model knows them all: models and datasets
    often count the same classes in another order. Raises RcProbeError for missing labels and unknown ones.
    """
    names = {number: str(name) for number, name in (config.id2label or {}).items()}
    known = {name.casefold(): number for number, name in names.items()}
    given = [name.casefold() for name in samples.classes]
    by_name = bool(given) and all(name in known for name in given)
    numbers = []
    for i, label in enumerate(_present(samples)):
        number = _number(label)
        if by_name and number is not None and 0 <= number < len(given):
            number = known[given[number]]
        elif isinstance(label, str) and label.casefold() in known:
            number = known[label.casefold()]
        if number is None or number not in names:
            raise _unknown(label, i, samples, list(names.values()))
        numbers.append(number)
    return numbers


def _number(label: Any) -> int | None:
    if isinstance(label, str):
        return int(label) if label.strip().isdecimal() else None
    if isinstance(label, int | float) and float(label).is_integer():
        return int(label)
    return None


def _unknown(label: Any, i: int, samples: Samples, names: list[str]) -> RcProbeError:
    shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    what = f"the label {str(label)[:80]!r} of sample {i} is none of the model's {len(names)} classes"
    todo = f"Give one of {shown} or a number from 0 to {len(names) - 1}, or leave --label-column out"
    return RcProbeError(what, where=samples.source, todo=todo)


def _present(samples: Samples) -> list[Any]:
    labels = samples.labels or []
    for i, label in enumerate(labels):
        if label is None or (isinstance(label, tuple) and None in label):
            raise RcProbeError(f"sample {i} has no label", where=samples.source, todo="Leave such rows out")
    return labels


def kind_of(samples: Samples) -> str:
    """What the labels are good for where no head predicts them: "pair", "similarity" or "class".

    pair: texts, most of them different; similarity: two columns, a text and a number. Raises RcProbeError for others.
    """
    labels = _present(samples)
    first = labels[0]
    if isinstance(first, tuple):
        for i, label in enumerate(labels):
            if samples.kind != "text" or len(label) != 2 or not _similar(label):
                what = f"{str(label)[:80]} of sample {i} is not a text and a number"
                todo = "Give the other text's column, then that of the similarity: --label-column TEXT,SCORE"
                raise RcProbeError(what, where=samples.source, todo=todo)
        return "similarity"
    if samples.kind == "text" and all(isinstance(label, str) for label in labels):
        return "pair" if len(set(labels)) > len(labels) / 2 else "class"
    for i, label in enumerate(labels):
        if _number(label) is None and not isinstance(label, str):
            what = f"the label {str(label)[:80]} of sample {i} is no class of {THINGS[samples.kind]}"
            todo = "Similarities need the other text's column, too: --label-column TEXT,SCORE"
            raise RcProbeError(what, where=samples.source, todo=todo)
    return "class"


def _similar(label: tuple[Any, ...]) -> bool:
    return isinstance(label[0], str) and isinstance(label[1], int | float)
