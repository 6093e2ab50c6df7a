"""Which task a model is for: found out by running it on two samples, not by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from rc_probe.data.batches import Batch, batches, long_enough
from rc_probe.data.samples import Samples
from rc_probe.data.tokens import what_is_read
from rc_probe.hooks.edits.model_state import measuring
from rc_probe.hooks.structure.example_inputs import batch_size as rows_of
from rc_probe.models.libraries import first_line
from rc_probe.models.load import Loaded
from rc_probe.results.words import THINGS

from .base import Task
from .labels import class_numbers, kind_of
from .model_trials import depends_on_padding, influences, logits_of, trunk_of
from .pooling import pooling_of
from .prediction import MaskedToken, NextToken, Prediction, TokenClasses
from .retrieval import Embedding

BESIDE = {
    "masked_spec_embed",
    "pooler",
}  # of the weights that a checkpoint lacks: no head of tokens reads them
LEAST_PAIRS, LEAST = 2, 3  # samples that retrieval needs
SHORT = 64  # tokens that say what a head is for
Chosen = tuple[Task | None, list[str]]
T = TypeVar("T")
_before: ContextVar[dict[Any, Any] | None] = ContextVar("before", default=None)


@contextmanager
def each_once() -> Iterator[None]:
    """While it is open, what was asked before is not found out again: the same model, samples and options give the same task,
    and the same texts are cut at the same letters."""
    token = _before.set({})
    try:
        yield
    finally:
        _before.reset(token)


def _once(kind: str, given: Iterable[object], options: tuple[Any, ...], find: Callable[[], T]) -> T:
    """What `find` gives, or what it gave for these objects and options while `each_once` has been open."""
    known, objects = _before.get(), [*given]
    if known is None:
        return find()
    key = kind, *map(id, objects), options
    if key not in known:
        known[key] = find(), objects  # which live on, so that an id stays that of this one
    found: T = known[key][0]
    return found


class _UnfitError(Exception):
    """Why the model's head, or the model, is not scored."""


def choose_task(
    loaded: Loaded,
    samples: Samples,
    *,
    length: int = 128,
    batch_size: int = 8,
    special_tokens: bool = True,
    seed: int = 0,
) -> Chosen:
    """(the task, notes for the reader): the one that the model's head is trained for, else retrieval.

    A head that gives logits over the vocabulary predicts the next token where no token depends on later ones, else
    the masked ones; logits over labels classify. Without such a head, or with one that the checkpoint lacks, so
    that it is random, the embeddings are scored. The samples' labels are used where the task has a use for them.

    length, batch_size, special_tokens: as `batches` will be called with; seed: of the masks.

    No task where nothing can be scored; a note says why. Raises RcProbeError for labels that cannot be meant.
    """
    given = [loaded.model, *samples.items, *(samples.labels or ())]
    options = length, batch_size, special_tokens, seed
    task, notes = _once("task", given, options, partial(_found_out, loaded, samples, *options))
    return task, list(notes)


def _found_out(
    loaded: Loaded, samples: Samples, length: int, batch_size: int, special_tokens: bool, seed: int
) -> Chosen:
    notes: list[str] = []
    task: Task | None = None
    with measuring(loaded.model):
        batch = partial(_trial, loaded, samples, batch_size, special_tokens)
        short = batch(min(length, SHORT))  # enough to tell most heads
        try:
            task = _by_head(loaded, samples, short, partial(batch, length), seed, notes)
        except _UnfitError as why:
            notes.append(f"Its head was not used: {why}.")
        try:
            task = task or _by_embedding(loaded, samples, short, length, special_tokens, notes)
        except _UnfitError as why:
            notes.append(f"Nothing was scored: {why}.")
    if samples.labels and isinstance(task, MaskedToken | NextToken | TokenClasses):
        notes.append(f"The label column was not used: the model's task is the {task.name}.")
    return task, notes


def embedding_task(
    loaded: Loaded, samples: Samples, *, length: int = 128, batch_size: int = 8, special_tokens: bool = True
) -> tuple[Embedding | None, list[str]]:
    """Retrieval by the model's embeddings, whatever its head is for. As `choose_task` otherwise."""
    batch = _trial(loaded, samples, batch_size, special_tokens, min(length, SHORT))
    notes: list[str] = []
    with measuring(loaded.model):
        try:
            return _by_embedding(loaded, samples, batch, length, special_tokens, notes), notes
        except _UnfitError as why:
            return None, [f"Embeddings were not measured: {why}."]


def _trial(loaded: Loaded, samples: Samples, batch_size: int, special_tokens: bool, length: int) -> Batch:
    """What the model is tried on: two samples, of at most `length` tokens."""
    few = replace(samples, items=_two(samples)[:batch_size])
    made = batches(few, loaded, length=length, batch_size=batch_size, special_tokens=special_tokens)
    return next(iter(made))


def _two(samples: Samples) -> list[Any]:
    """Of texts the longest and the shortest: if any is padded, it is."""
    if samples.kind != "text":
        return samples.items[:2]
    return [max(samples.items, key=len), min(samples.items, key=len)]


def _by_head(
    loaded: Loaded, samples: Samples, short: Batch, whole: Callable[[], Batch], seed: int, notes: list[str]
) -> Task | None:
    """The task of the model's head; None if it has none."""
    try:
        logits = logits_of(loaded.model, short.inputs)
    except Exception as error:  # of the library's heads, such as one that needs a padding token
        raise _UnfitError(f"it does not run ({first_line(error)})") from error
    if logits is None:
        return None
    labels = int(getattr(loaded.model.config, "num_labels", 0) or 0)
    classifies = tuple(logits.shape) == (rows_of(short.inputs), labels) and labels > 1
    if any(classifies or not BESIDE & set(name.split(".")) for name in loaded.random):
        raise _UnfitError("the checkpoint lacks it, so that it is random")
    if classifies:
        return _classification(loaded, samples, whole(), notes)
    ids = short.inputs.get("input_ids")
    if ids is None or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise _UnfitError(f"it gives logits of shape {tuple(logits.shape)}, neither of classes nor of tokens")
    return _of_tokens(loaded, samples, short, seed, notes)


def _classification(loaded: Loaded, samples: Samples, batch: Batch, notes: list[str]) -> Task:
    if depends_on_padding(loaded.model, batch):
        raise _UnfitError("what it says of a text depends on the padding beside it (--batch-size 1 has none)")
    numbers = class_numbers(samples, loaded.model.config) if samples.labels else None
    if numbers and len(set(numbers)) == 1:
        notes.append("All samples have the same label, so that accuracy says little.")
    return Prediction(loaded.model, samples, numbers)


def _of_tokens(loaded: Loaded, samples: Samples, batch: Batch, seed: int, notes: list[str]) -> Task:
    model = loaded.model
    special = frozenset(loaded.processor.all_special_ids)
    if model.get_output_embeddings() is None:
        return TokenClasses(model, samples, special=special)
    if model.config.is_encoder_decoder:
        notes.append("The decoder's next token is that of the text which the encoder reads: it copies.")
        return NextToken(model, samples, special=special, shifted=True)
    mask = getattr(loaded.processor, "mask_token_id", None)
    forwards, backwards = influences(model, batch)
    if not backwards and (forwards or mask is None):
        return NextToken(model, samples, special=special)
    if mask is None:
        raise _UnfitError("each token sees those after it, and the tokenizer has no mask token")
    return MaskedToken(model, samples, special=special, mask_id=mask, seed=seed)


def _by_embedding(
    loaded: Loaded, samples: Samples, batch: Batch, length: int, special_tokens: bool, notes: list[str]
) -> Embedding:
    model = trunk_of(loaded.model, batch)
    if model is None:
        raise _UnfitError("the model gives no last hidden state of its tokens")
    pooling, note = pooling_of(loaded)
    kind = kind_of(samples) if samples.labels else "half" if samples.kind == "text" else None
    things = THINGS[samples.kind]
    if kind is None or kind == "class":
        if len(samples.items) < LEAST:
            raise _UnfitError(f"retrieval needs at least {LEAST} {things}")
        notes.append(note)
        return Embedding(model, samples, pooling, labels=samples.labels)
    if kind == "half":
        given = [loaded.model, loaded.processor, *samples.items]
        read = partial(what_is_read, samples.items, loaded, length=length, special_tokens=special_tokens)
        samples = replace(samples, items=_once("read", given, (length, special_tokens), read))
    fits = long_enough(loaded, special_tokens)
    pairs = [pair for pair in _pairs(samples, kind) if fits is None or (fits(pair[0]) and fits(pair[1]))]
    if len(pairs) < len(samples.items):
        notes.append(
            f"{len(samples.items) - len(pairs)} pairs with a text of fewer than two tokens left out."
        )
    if len(pairs) < LEAST_PAIRS:
        raise _UnfitError(f"retrieval needs at least {LEAST_PAIRS} {things}")
    notes.append(note)
    items = [text for one, other, _ in pairs for text in (one, other)]
    alike = [float(score) for _, _, score in pairs] if kind == "similarity" else None
    return Embedding(
        model, replace(samples, items=items, labels=None), pooling, paired=True, similarity=alike
    )


def _pairs(samples: Samples, kind: str) -> list[tuple[str, str, Any]]:
    """(text, the other one, how alike they are or None)."""
    if not samples.labels:
        return [(*halves(text), None) for text in samples.items]
    both = zip(samples.items, samples.labels, strict=True)
    return [(text, *label) if kind == "similarity" else (text, label, None) for text, label in both]


def halves(text: str) -> tuple[str, str]:
    """The text cut in two at the space nearest its middle; in the middle where none is near."""
    middle = len(text) // 2
    spaces = (i for i, letter in enumerate(text) if letter.isspace())
    near = min(spaces, key=lambda i: abs(i - middle), default=middle)
    cut = near if abs(near - middle) <= middle / 2 else middle
    return text[:cut].strip(), text[cut:].strip()
