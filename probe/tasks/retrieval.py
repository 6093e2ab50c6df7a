"""Models without a head that predicts: what their embeddings find.

An embedding is the pooled last hidden state. What it is good for is to find things: a text by another one, the
nearest picture. Only embeddings leave a batch, and they are compared at the end of the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rc_probe.data.batches import Batch
from rc_probe.data.samples import Samples
from rc_probe.hooks.errors import RcProbeError

from .base import FULL, Prepared, Readout, Tally, Task, whole

POOLING = ("cls", "max", "mean", "weightedmean", "lasttoken")
CHUNK = 1024  # embeddings compared with all others at a time


@dataclass
class Embedding(Task):
    """Each sample finds the nearest by cosine.

    With `paired`, samples come in pairs (0 and 1, 2 and 3, …): the first of each looks among the second ones of all
    pairs. Without, each looks among all others, and there must be three.

    pooling: of POOLING, joined if there are several
    labels: of samples that are not paired: what the nearest should have in common with the one that looks
    similarity: of pairs: how alike they are by other judgement; then a pair is not wanted to find its other half
    """

    model: Any
    samples: Samples
    pooling: Sequence[str] = ("mean",)
    paired: bool = False
    labels: list[Any] | None = None
    similarity: list[float] | None = None
    name: str = "retrieval"
    metrics: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.similarity is not None:
            self.metrics = ("agreement", "spearman")
        elif self.paired or self.labels is not None:
            self.metrics = ("agreement", "accuracy")
        else:
            self.metrics = ("agreement",)

    def prepare(self, batch: Batch) -> Prepared:
        return whole(batch)

    def head(self, output: Any) -> Tensor:
        found = output if isinstance(output, Tensor) else output.get("last_hidden_state")
        if not isinstance(found, Tensor):
            raise RcProbeError("the output holds no last hidden state", where=type(self.model).__name__)
        return found

    def pooled(self, output: Any, prepared: Prepared) -> Tensor:
        """(rows, dim): the embeddings as they are, of any length."""
        hidden = self.head(output).detach()
        pooled = pool(_sequence(hidden, self.model.config), prepared.mask, self.pooling)
        if not bool(pooled.isfinite().all()):
            what = "its last hidden state holds NaN or infinity"
            raise RcProbeError(what, where=type(self.model).__name__, todo="Try --dtype float32")
        return pooled

    def read(self, output: Any, prepared: Prepared) -> Readout:
        """embedding: (rows, dim), of length 1 (or 0)."""
        pooled = self.pooled(output, prepared)
        return {"embedding": torch.nn.functional.normalize(pooled, dim=-1).cpu()}

    def tally(self) -> EmbeddingTally:
        return EmbeddingTally(self)

    def first(self, count: int) -> Embedding:
        """The same on the first `count` samples, or pairs."""
        items = self.samples.items[: 2 * count if self.paired else count]
        labels, alike = (given and given[:count] for given in (self.labels, self.similarity))
        samples = replace(self.samples, items=items, labels=None if self.paired else labels)
        return replace(self, samples=samples, labels=labels, similarity=alike)

    @property
    def quality(self) -> str | None:
        """The metric that says how well it finds, None where nothing says what is right."""
        return next((name for name in self.metrics if name != "agreement"), None)

    def found(self, embeddings: Tensor) -> Tensor:
        """embeddings (samples, dim) of length 1 -> (N,): which one each of those that look finds."""
        ones, others = (embeddings[::2], embeddings[1::2]) if self.paired else (embeddings, embeddings)
        found = []
        for start in range(0, len(ones), CHUNK):
            cosines = ones[start : start + CHUNK] @ others.T
            if not self.paired:
                own = torch.arange(len(cosines))
                cosines[own, own + start] = -2
            found.append(cosines.argmax(-1))
        return torch.cat(found)

    def right(self, found: Tensor) -> Tensor:
        """(N,): 1 where what is found is right, else 0. Equal texts are equal."""
        wanted = torch.tensor(self.classes())
        return (wanted[found] == wanted).double()

    def classes(self) -> list[int]:
        """(N,): equal numbers where it is right to find one from the other."""
        values = self.samples.items[1::2] if self.paired else self.labels or []
        numbers: dict[Any, int] = {}
        return [numbers.setdefault(value, len(numbers)) for value in values]

    def correlation(self, embeddings: Tensor, of: slice = slice(None)) -> float:
        """Spearman's, of the pairs' cosines and their similarity, over some pairs; 0 where all cosines are equal, which ranks nothing."""
        from scipy.stats import spearmanr

        assert self.similarity is not None
        cosines = (embeddings[::2] * embeddings[1::2]).sum(-1).numpy()[of]
        return float(spearmanr(cosines, self.similarity[of]).statistic) if np.ptp(cosines) else 0.0


class EmbeddingTally(Tally):
    """agreement: whether a sample finds the same one as with the full model; accuracy: whether it finds the right one;
    spearman: rank correlation of cosine and given similarity, of the whole run."""

    task: Embedding
    _ORDER = "samples"  # key of their numbers, in the order in which they came

    def _begin(self) -> None:
        self._put(self._ORDER, {"number": torch.tensor([*self._prepared.samples])})

    def _keep(self, key: Hashable, readout: Readout) -> None:
        self._put(key, readout)

    def scores(self) -> dict[Hashable, dict[str, Tensor]]:
        found = self._embeddings()
        full = self.task.found(found[FULL])
        return {key: self._score(embeddings, full) for key, embeddings in found.items()}

    def counts(self) -> Tensor:
        numbers = self._joined()[self._ORDER]["number"]
        return torch.ones(len(numbers) // 2 if self.task.paired else len(numbers), dtype=torch.float64)

    def _embeddings(self) -> dict[Hashable, Tensor]:
        """For each version, (samples, dim) in the order of the samples."""
        joined = self._joined()
        order = joined.pop(self._ORDER)["number"].argsort()
        return {key: values["embedding"][order] for key, values in joined.items()}

    def _score(self, embeddings: Tensor, full: Tensor) -> dict[str, Tensor]:
        found = self.task.found(embeddings)
        scores = {"agreement": (found == full).double()}
        if self.task.quality == "spearman":
            scores["spearman"] = torch.tensor([self.task.correlation(embeddings)], dtype=torch.float64)
        elif self.task.quality:
            scores["accuracy"] = self.task.right(found)
        return scores

    def baselines(self) -> dict[str, float]:
        """agreement: share of the one that is found most; accuracy: chance; spearman: 0, of unrelated numbers."""
        full = self.task.found(self._embeddings()[FULL]).tolist()
        found = {"agreement": max(Counter(full).values()) / len(full)}
        if self.task.quality:
            found[self.task.quality] = 0.0 if self.task.quality == "spearman" else self._chance()
        return found

    def _chance(self) -> float:
        """Accuracy of finding one at random: 1 / N for pairs of different texts."""
        classes = self.task.classes()
        count, own = len(classes), 0 if self.task.paired else 1
        return sum(n * (n - own) for n in Counter(classes).values()) / (count * (count - own))


def pool(hidden: Tensor, mask: Tensor | None, modes: Sequence[str]) -> Tensor:
    """(B, T, D) -> (B, D × modes): the real tokens in one vector. Names and order as in sentence-transformers."""
    hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
    batch, tokens, _ = hidden.shape
    real = torch.ones(batch, tokens, dtype=torch.bool) if mask is None else mask
    real = real.to(hidden.device)
    hidden = hidden.masked_fill(~real[..., None], 0)
    weight = real.to(hidden.dtype)[..., None]  # (B, T, 1)
    place = torch.arange(tokens, device=hidden.device)
    first = real.int().argmax(1)
    last = (real * place).argmax(1)
    rows = torch.arange(batch, device=hidden.device)

    def mean(weight: Tensor) -> Tensor:
        return (hidden * weight).sum(1) / weight.sum(1)

    pooled = {
        "cls": lambda: hidden[rows, first],
        "max": lambda: hidden.masked_fill(~real[..., None], -torch.inf).amax(1),
        "mean": lambda: mean(weight),
        "weightedmean": lambda: mean(weight * (place + 1)[:, None]),
        "lasttoken": lambda: hidden[rows, last],
    }
    return torch.cat([pooled[mode]() for mode in modes], dim=-1)


def _sequence(hidden: Tensor, config: Any) -> Tensor:
    """(B, T, D), also of images as the maps (B, D, height, width) or (B, height, width, D)."""
    if hidden.ndim != 4:
        return hidden if hidden.ndim == 3 else hidden[:, None]
    dim = getattr(config, "hidden_size", None) or (getattr(config, "hidden_sizes", None) or [None])[-1]
    last = hidden.shape[-1] == dim and hidden.shape[1] != dim
    return hidden.flatten(1, 2) if last else hidden.flatten(2).mT
