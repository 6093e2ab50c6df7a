"""Embeddings of a run: the samples as they are, and retrieval as the task has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from rc_probe import engine
from rc_probe.budget import AT_MOST, DOUBLE, Shape, first_that_fits
from rc_probe.data.batches import batches
from rc_probe.data.samples import Samples
from rc_probe.measures.curves import SVD
from rc_probe.measures.measurement import Found
from rc_probe.metrics.embeddings import Cosines, Spectrum, coarse, pair_cosines, spectrum
from rc_probe.metrics.intervals import ENOUGH, change_interval, interval
from rc_probe.models.load import Loaded
from rc_probe.results.tables import Row
from rc_probe.results.words import THINGS
from rc_probe.tasks import choose_task, embedding_task, first
from rc_probe.tasks.retrieval import Embedding

from .pooled import PooledReader, together

if TYPE_CHECKING:
    from rc_probe.measures.context import Context

SHOWN = 10  # principal components in the table
BINS = 100  # of the histogram from −1 to 1
BYTES = 4  # of what is kept of an embedding, a coordinate


@dataclass(frozen=True)
class Plan:
    """samples: of which the embeddings are; task: how they are pooled, and what they are to find; None with a note that says why."""

    samples: Samples
    task: Embedding | None
    notes: list[str]


def plan_embeddings(loaded: Loaded, samples: Samples, chosen: Any) -> Plan | None:
    """None where the model's own task is another, unless embeddings were asked for. Raises for labels that cannot be meant."""
    how = {"length": chosen.length, "batch_size": chosen.batch_size, "special_tokens": chosen.special_tokens}
    if len(samples.items) < 2:
        return Plan(
            samples,
            None,
            ["Embeddings were not measured: one sample has no pair."] if chosen.embeddings else [],
        )
    if chosen.embeddings is None:
        few = first(samples, chosen.importance_samples)  # as importance asks, so that it is found out once
        if not isinstance(choose_task(loaded, few, seed=chosen.seed, **how)[0], Embedding):
            return None
    return Plan(samples, *embedding_task(loaded, samples, **how))


def measure_embeddings(context: Context, plan: Plan) -> Found:
    """Every table, what was cut to stay affordable, and the best layer."""
    task, samples, notes = plan.task, plan.samples, list(plan.notes)
    if task is None:
        return Found(notes=notes)
    count = affordable(context.shape, bool(task.paired))
    if count < len(samples.items):
        notes.append(
            f"Embeddings: of the first {count} {THINGS[samples.kind]}, so that they cost no more than {AT_MOST} and 1 GiB."
        )
        task, samples = task.first(count), first(samples, count)
    seen = context.readers.get("embeddings")
    whole, eps = _gathered(context, seen) if seen else _read(context, samples, task)
    looking = _read(context, task.samples, task)[0] if task.paired else whole
    texts = samples.items if samples.kind == "text" else None
    same = None if texts is None else [*map({text: n for n, text in enumerate(texts)}.__getitem__, texts)]
    rows: list[Row] = []
    components: list[Row] = []
    for layer, embeddings in whole.items():
        cosines, found = pair_cosines(embeddings, same), spectrum(embeddings, eps)
        rows += [{"layer": layer, **row, "count": len(embeddings)} for row in _geometry(cosines, found)]
        components += [
            {"layer": layer, "component": n, "share": float(share)}
            for n, share in enumerate(found.shares[:SHOWN], 1)
        ]
    scores = Retrieval(task, {layer: normalize(found, dim=-1) for layer, found in looking.items()})
    rows += scores.rows()
    if cosines is None:
        notes.append(f"Embeddings: all {THINGS[samples.kind]} are the same, so that no pair has a cosine.")
    bins = coarse(cosines.histogram, BINS) if cosines else []  # of the last layer, the model's own
    facts = {
        "samples": len(samples.items),
        "things": THINGS[samples.kind],
        "pooling": list(task.pooling),
        "best": scores.best(),
    }
    histogram = [{"low": low, "high": high, "pairs": pairs} for low, high, pairs in bins]
    tables = {"embeddings": rows, "embedding_components": components, "embedding_cosines": histogram}
    return Found(tables, notes, facts)


def curve_reader(context: Context, plan: Plan | None) -> PooledReader | None:
    """What reads the curves' passes; None where these are of another model than the task's, or of more samples than are affordable."""
    if plan is None or plan.task is None or plan.task.model is not context.structure.model:
        return None
    if affordable(context.shape, bool(plan.task.paired)) < len(plan.samples.items):
        return None
    return PooledReader(plan.task, context.structure.depth)


def affordable(shape: Shape, paired: bool) -> int:
    """Samples whose embeddings are measured: all, or half of them, a quarter …, as rc_probe.budget allows; at least two."""
    layers, dim = shape.blocks + 1, shape.dim
    kept = 3 if paired else 1  # embeddings of a sample: its own, and of its halves

    def work(n: int) -> float:
        return float(layers * DOUBLE) * n * dim * (2 * SVD * min(n, dim) + kept * n)

    choices = [
        shape.samples >> half for half in range(shape.samples.bit_length()) if shape.samples >> half >= 2
    ]
    return first_that_fits(choices, shape, work, lambda n: float(BYTES * kept * layers * n * dim)) or 2


def _read(context: Context, samples: Samples, task: Embedding) -> tuple[dict[int, Tensor], float]:
    """The embeddings of `samples` by layer, those of all processes together, and the eps of what they were computed in."""
    chosen = context.settings
    made = batches(
        samples, context.loaded, length=chosen.length, batch_size=chosen.batch_size, special_tokens=chosen.special_tokens
    )  # fmt: skip
    reader = PooledReader(task, context.structure.depth)
    mine = made.of(context.world.share(range(len(made))))
    context.advance("embeddings")
    engine.run(context.structure, mine, {}, [reader], model=task.model)
    return _gathered(context, reader)


def _gathered(context: Context, reader: PooledReader) -> tuple[dict[int, Tensor], float]:
    """What the readers of all processes have seen."""
    parts = context.world.gather((reader.seen, reader.eps, reader.error), what="embeddings")
    for *_, error in parts:
        if error is not None:
            raise error
    return together(part for seen, *_ in parts for part in seen), max(eps for _, eps, _ in parts)


def _geometry(cosines: Cosines | None, found: Spectrum) -> Iterator[Row]:
    nothing = {"std": None, "low": None, "high": None, "most": None}
    if cosines is not None:
        low, high = cosines.interval
        spread = {"std": cosines.std, "low": low, "high": high}
        yield {"metric": "embedding_cosine", "value": cosines.mean, **nothing, **spread}
        yield {"metric": "embedding_cosine_far", "value": cosines.far, **nothing}
    if len(found.shares):
        yield {"metric": "first_component", "value": float(found.shares[0]), **nothing}
        if np.isfinite(found.isoscore):
            most = {"most": found.most_isoscore}
            yield {"metric": "isoscore", "value": found.isoscore, **nothing, **most}
    yield {"metric": "rankme", "value": found.rankme, **nothing, "most": float(found.most_rank)}


class Retrieval:
    """How well the embeddings of each layer find what they should, and which find best.

    The best layer is chosen by every second of those that look, and scored by the others. Among equals the last one is taken.
    """

    def __init__(self, task: Embedding, embeddings: dict[int, Tensor]) -> None:
        self.task, self.embeddings, self.metric = task, embeddings, task.quality
        self.hits = (
            {layer: task.right(task.found(one)) for layer, one in embeddings.items()}
            if self.metric == "accuracy"
            else {}
        )
        self.count = len(next(iter(embeddings.values()))) // (2 if task.paired else 1)

    def rows(self) -> Iterator[Row]:
        for layer in self.embeddings if self.metric else ():
            hits = self.hits.get(layer)
            low, high = (
                (None, None) if hits is None else interval(hits.numpy(), "accuracy", np.ones(len(hits)))
            )
            yield {"layer": layer, "metric": self.metric, "value": self.score(layer), "std": None, "low": low,
                   "high": high, "most": None, "count": self.count}  # fmt: skip

    def score(self, layer: int, of: slice = slice(None)) -> float:
        """Of some of those that look, among all candidates."""
        if self.metric == "spearman":
            return self.task.correlation(self.embeddings[layer], of)
        return float(self.hits[layer][of].mean())

    def best(self) -> dict[str, Any] | None:
        """None where nothing says what is right, or too few look to choose and to score."""
        if self.metric is None or self.count < 2 * ENOUGH:
            return None
        choosing, scoring = slice(0, None, 2), slice(1, None, 2)
        own = max(self.embeddings)
        layer = max(self.embeddings, key=lambda n: (self.score(n, choosing), n))
        low, high = None, None
        if self.hits:
            mine, theirs = (self.hits[n][scoring].numpy() for n in (layer, own))
            low, high = change_interval(mine, theirs, "accuracy")
        return {
            "metric": self.metric, "layer": layer, "chosen": self.score(layer, choosing), "value": self.score(layer, scoring),
            "own": self.score(own, scoring), "low": low, "high": high, "count": len(range(self.count)[scoring]),
        }  # fmt: skip
