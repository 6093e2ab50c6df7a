"""The samples that are measured: texts, images or sounds, from the package, a file, a folder, the Hub, or Python.

Whatever the source, rows are read one after the other until enough samples are found, in the order of the
source, so that a run on 32 samples of a large file reads 32 samples.
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

from rc_probe.hooks.errors import RcProbeError

from . import kept
from .sound import is_sound, sound_files
from .source import first_line, hub_problem, quiet
from .tables import TABLES, Row, json_lines, readable, rows_of

BUNDLED = Path(__file__).parent / "samples"
COLUMNS = {
    "text": ("text", "sentence", "content", "document", "article", "body", "review", "prompt"),
    "image": ("image", "img", "photo", "picture"),
    "audio": ("audio", "sound", "speech", "recording"),
}
SPLITS = ("validation", "test", "train")  # the first of these that a Hub dataset has
TEXT_FILES = {".txt", ".text", ".md"}
ACCEPTED = {
    "text": "Give a .txt, .jsonl, .json, .csv, .tsv or .parquet file, or a Hub dataset",
    "image": "Give a folder of images, or a Hub dataset",
    "audio": "Give --data: a folder of .wav, .flac, .ogg or .mp3 files, or a Hub dataset",
}
THINGS = {"text": "texts", "image": "images", "audio": "sounds"}  # what samples are called
PYTHON = {
    "text": "texts",
    "image": "PIL images",
    "audio": "arrays (N,), or pairs of one and its sampling rate",
}
WRAPPED = 100  # characters; prose wrapped by hand has no longer lines


@dataclass(frozen=True)
class Samples:
    """The samples of a run. kind: "text", "image" or "audio"; source, note: for the reader, the note may be "".

    items: texts, images (PIL images) or sounds (see `rc_probe.sound.wave`); of images and sounds also the
    paths of files, which are opened when their batch is made.
    """

    kind: str
    source: str
    items: list[Any]
    note: str = ""


def load_samples(
    spec: Any = None,
    *,
    modality: str,
    column: str | None = None,
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
    fits: `rc_probe.batches.long_enough(...)`, to look on until there are enough samples that can be measured

    Raises RcProbeError if there is nothing to measure, or not what was meant.
    """
    source, stream = kept.read(_open, spec, modality, column)
    things = THINGS[modality]
    items: list[Any] = []
    empty = short = 0
    for item in stream:
        if modality == "text" and not item.strip():
            empty += 1
        elif fits and not fits(item):
            short += 1
        else:
            items.append(item)
        if len(items) == samples:
            break
    if not items and short:
        what = f"every {things[:-1]} has fewer than two tokens, and one token cannot collapse onto another"
        raise RcProbeError(what, where=source, todo=f"Give longer {things}")
    if not items:
        raise RcProbeError(f"no {things} in it", where=source, todo=ACCEPTED[modality])
    notes = [f"{empty} empty texts left out"] if empty else []
    notes += [f"{short} {things} of fewer than two tokens left out"] if short else []
    notes += [f"{len(items)} samples, not {samples}: there are no more"] if len(items) < samples else []
    return Samples(modality, source, items, "; ".join(notes))


def _open(spec: Any, modality: str, column: str | None) -> tuple[str, Iterator[Any]]:
    """(name of the source, its samples in order)."""
    if spec is None and column:
        raise _no_columns("the bundled samples", column)
    if spec is None and modality == "audio":
        raise RcProbeError("no sounds come with rc-probe", where="data", todo=ACCEPTED["audio"])
    if spec is None and modality == "text":
        rows = json_lines(BUNDLED / "biographies.jsonl")
        return "bundled biographies", (row["text"] for row in rows)
    if spec is None:
        return "bundled photographs", _image_files(BUNDLED / "photos")
    if isinstance(spec, str | os.PathLike):
        return _open_named(os.fspath(spec), modality, column)
    if isinstance(spec, dict):
        todo = f"Choose one split: {', '.join(map(str, spec))}"
        raise RcProbeError("several datasets in one", where="data", todo=todo)
    source = type(spec).__name__
    if not isinstance(spec, Iterable):
        raise RcProbeError(
            f"{source} holds no samples", where="data", todo=f"Give a list of {PYTHON[modality]}"
        )
    if hasattr(spec, "to_dict") and hasattr(spec, "columns"):  # a DataFrame
        return source, _column(spec.to_dict("records"), modality, column, source)
    if hasattr(spec, "column_names"):  # a datasets.Dataset or IterableDataset
        return source, _column(_undecoded(spec), modality, column, source)
    if column:
        raise _no_columns("data", column)
    return f"{source} of {THINGS[modality]}", _checked(spec, modality, "data")


def _open_named(spec: str, modality: str, column: str | None) -> tuple[str, Iterator[Any]]:
    path = Path(spec).expanduser()
    suffix = path.suffix.lower()
    is_text = suffix in TEXT_FILES | TABLES
    if is_text and not path.is_file():
        raise RcProbeError("no such file", where=spec, todo="Check the path")
    if path.exists() and (modality == "text") != is_text:
        what = f"the model takes {THINGS[modality]}, and this is no source of {THINGS[modality]}"
        raise RcProbeError(what, where=spec, todo=ACCEPTED[modality])
    if path.exists() and suffix not in TABLES and column:
        raise _no_columns(spec, column)
    if suffix in TEXT_FILES:
        return _texts(path)
    if suffix in TABLES:
        return spec, _column(rows_of(path), modality, column, spec)
    if path.exists():
        return spec, sound_files(path) if modality == "audio" else _image_files(path)
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise RcProbeError("no such file or folder", where=spec, todo="Check the path")
    return _hub(spec, modality, column)


def _no_columns(where: str, column: str) -> RcProbeError:
    return RcProbeError(
        f"there are no columns here, so no {column!r}", where=where, todo="Leave --column out"
    )


def _texts(path: Path) -> tuple[str, Iterator[str]]:
    """A text a line; or a text a paragraph, if most paragraphs have several lines and no line is long."""
    text = readable(path)
    lines = text.splitlines()
    paragraphs = [
        list(group) for full, group in itertools.groupby(lines, lambda line: bool(line.strip())) if full
    ]
    several = sum(len(lines) > 1 for lines in paragraphs) > len(paragraphs) / 2
    if len(paragraphs) > 1 and several and max(map(len, lines)) <= WRAPPED:
        return f"{path} (paragraphs)", (" ".join(map(str.strip, lines)) for lines in paragraphs)
    return f"{path} (lines)", (line.strip() for line in lines if line.strip())


def _image_files(path: Path) -> Iterator[Path]:
    from PIL import Image

    known = Image.registered_extensions()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.suffix.lower() in known and not file.name.startswith("."):
            open_image(file).close()  # so that a broken one is found now and not in the middle
            yield file


def open_image(path: Path) -> Any:
    """The PIL image of a file, not decoded yet."""
    from PIL import Image

    try:
        return Image.open(path)
    except Exception as error:  # each format has errors of its own
        what = f"not a readable image ({first_line(error)})"
        raise RcProbeError(what, where=str(path), todo="Remove or replace it") from error


def _hub(spec: str, modality: str, column: str | None) -> tuple[str, Iterator[Any]]:
    """A Hub dataset, streamed. The second of two parts is a split if called like one, else a config."""
    name, config, split = ([*spec.split(":"), "", ""])[:3]
    if config in SPLITS and not split:
        config, split = "", config
    problem = hub_problem()
    if problem and "HF_HUB_OFFLINE" not in problem:  # offline by will: datasets looks at its cache, at once
        raise RcProbeError(f"no such file or folder, and {problem}", where=spec, todo=ACCEPTED[modality])
    import datasets

    try:
        with quiet():
            found = datasets.load_dataset(name, config or None, split=split or None, streaming=True)
            if isinstance(found, dict):
                split = next((split for split in SPLITS if split in found), next(iter(found)))
                found = found[split]
    except Exception as error:
        todo = f"Check name:config:split. {ACCEPTED[modality]}"
        what = f"no such file or folder, and the dataset does not load ({first_line(error)})"
        raise RcProbeError(what, where=spec, todo=todo) from error
    source = ":".join(part for part in (name, config, split) if part)
    return source, _column(_streamed(_undecoded(found), source), modality, column, source)


def _undecoded(rows: Any) -> Any:
    """Sounds of a dataset as they are stored: to decode them `datasets` needs torchcodec and FFmpeg."""
    for name, feature in (getattr(rows, "features", None) or {}).items():
        if type(feature).__name__ == "Audio":
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


def _streamed(rows: Iterable[Row], source: str) -> Iterator[Row]:
    try:
        yield from rows
    except Exception as error:
        what = f"the dataset cannot be read ({first_line(error)})"
        raise RcProbeError(what, where=source, todo="Try again, or give a local file") from error


def _column(rows: Iterable[Row], modality: str, column: str | None, source: str) -> Iterator[Any]:
    """The values of one column of `rows`."""
    stream = iter(rows)
    first = next(stream, None)
    if first is None:
        return iter(())
    name = _choose(first, modality, column, source)
    values = (row.get(name) for row in itertools.chain([first], stream))
    return _checked(values, modality, f"{source}, column {name!r}")


def _choose(row: Row, modality: str, column: str | None, source: str) -> str:
    names = [str(name) for name in row]
    if column in names:
        return str(column)
    there = f"The columns are {', '.join(names)}"
    if column:
        near = difflib.get_close_matches(column, names, 1)
        todo = f"Did you mean {near[0]!r}? {there}" if near else there
        raise RcProbeError(f"no column {column!r}", where=source, todo=todo)
    usual = [name for name in COLUMNS[modality] if name in names]
    fitting = [str(name) for name, value in row.items() if _is(value, modality)]
    if not usual and len(fitting) != 1:
        what = f"{'several columns' if fitting else 'no column'} of {THINGS[modality]}"
        raise RcProbeError(what, where=source, todo=f"Choose one with --column. {there}")
    return usual[0] if usual else fitting[0]


def _is(value: Any, modality: str) -> bool:
    if modality == "audio":
        return is_sound(value)
    return (
        isinstance(value, str) if modality == "text" else hasattr(value, "convert") and hasattr(value, "size")
    )


def _checked(values: Iterable[Any], modality: str, where: str) -> Iterator[Any]:
    """The values, each a text, an image or a sound; a missing text is an empty one."""
    for index, value in enumerate(values):
        if modality == "text" and (value is None or (isinstance(value, float) and isnan(value))):
            yield ""
        elif _is(value, modality):
            yield value
        else:
            what = f"row {index} is a {type(value).__name__}, and the model takes {THINGS[modality]}"
            raise RcProbeError(what, where=where, todo="Choose another --column or other data")
