"""The samples that are measured: texts, images or sounds, from the package, a file, a folder, the Hub, or Python.

Whatever the source, rows are read one after the other until enough samples are found, in the order of the
source, so that a run on 32 samples of a large file reads 32 samples.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rc_probe.hooks.errors import RcProbeError
from rc_probe.models.libraries import first_line, hub_problem, quiet
from rc_probe.results.words import THINGS, many

from . import read_once
from .columns import Wanted, checked, class_names, opened_rows
from .delimited import numbers_of
from .places import IMAGES, SOUNDS, TABLES, TEXT_FILES, check_place, files_below
from .read_once import Opened
from .table_files import DELIMITED, Record, json_lines, readable, rows_of

BUNDLED = Path(__file__).parent / "bundled"
SPLITS = ("validation", "test", "train")  # the first of these that a Hub dataset has
ACCEPTED = {
    "text": "Give a .txt, .jsonl, .json, .csv, .tsv or .parquet file, or a Hub dataset",
    "image": "Give a folder of images, or a Hub dataset",
    "audio": "Give --data: a folder of .wav, .flac, .ogg or .mp3 files, or a Hub dataset",
}
PYTHON = {
    "text": "texts",
    "image": "PIL images",
    "audio": "arrays (N,), or pairs of one and its sampling rate",
}
FOLDER = "folder"  # as a label column: the folders of files name their classes
WRAPPED = 100  # characters; prose wrapped by hand has no longer lines


@dataclass(frozen=True)
class Samples:
    """The samples of a run. kind: "text", "image" or "audio"; source, note: for the reader, the note may be "".

    items: texts, images (PIL images) or sounds (see `rc_probe.data.sounds.wave`); of images and sounds also the
    paths of files, which are opened when their batch is made.
    labels: the value of the label column of each, a tuple where it names two columns; None without one
    classes: the names of the labels 0, 1, … where the dataset has them
    column: of a table, the one that they stand in
    """

    kind: str
    source: str
    items: list[Any]
    note: str = ""
    labels: list[Any] | None = None
    classes: tuple[str, ...] = ()
    column: str | None = None


def load_samples(
    spec: Any = None,
    *,
    modality: str,
    column: str | None = None,
    label_column: str | None = None,
    samples: int = 32,
    fits: Callable[[Any], bool] | None = None,
) -> Samples:
    """The first `samples` samples of `spec`; empty texts, and samples that do not pass `fits`, are left out.

    spec: None, the bundled biographies or photographs (no sounds); the path of a text file (a text a line, or, if it
        is prose wrapped by hand, a text a paragraph), of a jsonl, json, csv, tsv or parquet file, of an
        image or a sound or a folder of them; a Hub dataset `name[:config][:split]`; a list of texts, PIL
        images, arrays (N,) or pairs (array, sampling rate); a datasets.Dataset; a DataFrame
    modality: "text", "image" or "audio", what the model takes
    column: of a table; found by itself if its name is a usual one or no other column fits
    label_column: of a table, or two with a comma between; "folder": the name of the folder that a file lies in
    fits: `rc_probe.data.batches.long_enough(...)`, to look on until there are enough samples that can be measured

    Raises RcProbeError if there is nothing to measure, or not what was meant.
    """
    opened = read_once.read(_open, spec, Wanted(modality, column, label_column))
    source, things = opened.source, THINGS[modality]
    items: list[Any] = []
    labels: list[Any] = []
    empty = short = 0
    for item, label in opened.stream:
        if modality == "text" and not item.strip():
            empty += 1
        elif fits and not fits(item):
            short += 1
        else:
            items.append(item)
            labels.append(label)
        if len(items) == samples:
            break
    if not items and short:
        what = f"every {things[:-1]} has fewer than two tokens, and one token cannot collapse onto another"
        raise RcProbeError(what, where=source, todo=f"Give longer {things}")
    if not items:
        raise RcProbeError(f"no {things} in it", where=source, todo=ACCEPTED[modality])
    notes = [opened.note] if opened.note else []
    notes += [f"{empty} empty texts left out"] if empty else []
    notes += [f"{short} {things} of fewer than two tokens left out"] if short else []
    notes += (
        [f"{many(len(items), 'samples')}, not {samples}: there are no more"] if len(items) < samples else []
    )
    found = None if not label_column else _typed(labels) if opened.untyped else labels
    return Samples(modality, source, items, "; ".join(notes), found, opened.classes, opened.column)


def _typed(labels: list[Any]) -> list[Any]:
    """Labels that are all texts, as a file has them: each column of numbers as numbers."""
    if not isinstance(labels[0], tuple):
        return numbers_of(labels)
    return list(zip(*(numbers_of(list(column)) for column in zip(*labels, strict=True)), strict=True))


def _open(spec: Any, wanted: Wanted) -> Opened:
    modality = wanted.modality
    if spec is None:
        wanted.no_columns("the bundled samples")
    if spec is None and modality == "audio":
        raise RcProbeError("no sounds come with rc-probe", where="data", todo=ACCEPTED["audio"])
    if spec is None and modality == "text":
        rows = json_lines(BUNDLED / "biographies.jsonl")
        return _unlabelled("bundled biographies", (row["text"] for row in rows))
    if spec is None:
        return _unlabelled("bundled photographs", _image_files(BUNDLED / "photos"))
    if isinstance(spec, str | os.PathLike):
        return _open_named(os.fspath(spec), wanted)
    if isinstance(spec, dict):
        todo = f"Choose one split: {', '.join(map(str, spec))}"
        raise RcProbeError("several datasets in one", where="data", todo=todo)
    source = type(spec).__name__
    if not isinstance(spec, Iterable):
        raise RcProbeError(
            f"{source} holds no samples", where="data", todo=f"Give a list of {PYTHON[modality]}"
        )
    if hasattr(spec, "to_dict") and hasattr(spec, "columns"):  # a DataFrame
        return opened_rows(spec.to_dict("records"), wanted, source)
    if hasattr(spec, "column_names"):  # a datasets.Dataset or IterableDataset
        return opened_rows(_undecoded(spec), wanted, source, classes=class_names(spec, wanted))
    wanted.no_columns("data")
    values = (checked(value, i, modality, "data") for i, value in enumerate(spec))
    return _unlabelled(f"{source} of {THINGS[modality]}", values)


def _unlabelled(source: str, items: Iterable[Any]) -> Opened:
    return Opened(source, ((item, None) for item in items))


def _open_named(spec: str, wanted: Wanted) -> Opened:
    modality = wanted.modality
    if spec.startswith("lm-eval:"):
        from .lm_eval_texts import task_texts

        wanted.no_columns(spec)
        return _unlabelled(
            spec, (checked(text, i, modality, spec) for i, text in enumerate(task_texts(spec)))
        )
    check_place(spec)
    path = Path(spec).expanduser()
    suffix = path.suffix.lower()
    is_text = suffix in TEXT_FILES | TABLES and path.is_file()
    if path.exists() and (modality == "text") != is_text:
        what = f"the model takes {THINGS[modality]}, and this is no source of {THINGS[modality]}"
        raise RcProbeError(what, where=spec, todo=ACCEPTED[modality])
    if is_text and suffix in TABLES:
        return opened_rows(rows_of(path), wanted, spec, untyped=suffix in DELIMITED)
    if path.is_dir() and wanted.label_column == FOLDER and not wanted.column:
        return Opened(spec, _by_folder(path, modality))
    if path.exists():
        wanted.no_columns(spec)
    if is_text:
        return _unlabelled(*_texts(path))
    if path.exists():
        return _unlabelled(spec, _files(path, modality))
    return _hub(spec, wanted)


def _texts(path: Path) -> tuple[str, Iterator[str]]:
    """A text a line; or a text a paragraph, if most paragraphs have several lines and no line is long."""
    text = readable(path)
    lines = (
        text.removesuffix("\n").split("\n") if text else []
    )  # at newlines alone, not at U+2028 and its kin
    paragraphs = [
        list(group) for full, group in itertools.groupby(lines, lambda line: bool(line.strip())) if full
    ]
    several = sum(len(lines) > 1 for lines in paragraphs) > len(paragraphs) / 2
    if len(paragraphs) > 1 and several and max(map(len, lines)) <= WRAPPED:
        return f"{path} (paragraphs)", (" ".join(map(str.strip, lines)) for lines in paragraphs)
    return f"{path} (lines)", (line.strip() for line in lines if line.strip())


def _files(path: Path, modality: str) -> Iterator[Path]:
    return iter(files_below(path, SOUNDS)) if modality == "audio" else _image_files(path)


def _by_folder(path: Path, modality: str) -> Iterator[tuple[Path, str]]:
    """The files below `path` with the names of their folders, one of each folder in turn: few samples show all."""

    def files(folder: Path) -> Iterator[Path]:
        return (file for file in _files(folder, modality) if file.parent == folder)

    if any(files(path)):
        todo = "Put the files of each class into a folder of its name"
        raise RcProbeError("files lie in no folder that could name them", where=str(path), todo=todo)
    folders = sorted({file.parent for file in path.rglob("*") if file.is_file()})
    for files_in_turn in itertools.zip_longest(*map(files, folders)):
        yield from ((file, file.parent.name) for file in files_in_turn if file)


def _image_files(path: Path) -> Iterator[Path]:
    for file in files_below(path, IMAGES):
        open_image(file).close()  # so that a broken one is found now and not in the middle
        yield file


def open_image(path: Path) -> Any:
    """The PIL image of a file, not decoded yet."""
    from PIL import Image

    try:
        with warnings.catch_warnings(action="ignore"):  # about tags that are damaged
            return Image.open(path)
    except Exception as error:  # each format has errors of its own
        what = f"not a readable image ({first_line(error)})"
        raise RcProbeError(what, where=str(path), todo="Remove or replace it") from error


def _hub(spec: str, wanted: Wanted) -> Opened:
    """A Hub dataset, streamed. The second of two parts is a split if called like one, else a config."""
    name, config, split = ([*spec.split(":"), "", ""])[:3]
    if config in SPLITS and not split:
        config, split = "", config
    problem = hub_problem()
    if problem and "HF_HUB_OFFLINE" not in problem:  # offline by will: datasets looks at its cache, at once
        raise RcProbeError(
            f"no such file or folder, and {problem}", where=spec, todo=ACCEPTED[wanted.modality]
        )
    import datasets

    try:
        with quiet():
            found = datasets.load_dataset(name, config or None, split=split or None, streaming=True)
            if isinstance(found, dict):
                split = next((split for split in SPLITS if split in found), next(iter(found)))
                found = found[split]
    except Exception as error:
        todo = f"Check name:config:split. {ACCEPTED[wanted.modality]}"
        what = f"no such file or folder, and the dataset does not load ({first_line(error)})"
        raise RcProbeError(what, where=spec, todo=todo) from error
    source = ":".join(part for part in (name, config, split) if part)
    rows = _streamed(_undecoded(found), source)
    return opened_rows(rows, wanted, source, classes=class_names(found, wanted))


def _undecoded(rows: Any) -> Any:
    """Sounds of a dataset as they are stored: to decode them `datasets` needs torchcodec and FFmpeg."""
    for name, feature in (getattr(rows, "features", None) or {}).items():
        if type(feature).__name__ == "Audio":
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


def _streamed(rows: Iterable[Record], source: str) -> Iterator[Record]:
    try:
        yield from rows
    except Exception as error:
        what = f"the dataset cannot be read ({first_line(error)})"
        raise RcProbeError(what, where=source, todo="Try again, or give a local file") from error
