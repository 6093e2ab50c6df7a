"""Tasks whose head chooses one of several classes: tokens of the vocabulary, or labels.

Only the chosen class and the log-probability of the right one leave a batch, never logits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rc_probe.data.batches import Batch
from rc_probe.data.samples import Samples
from rc_probe.hooks.errors import RcProbeError

from .base import Prepared, Readout, Tally, Task, whole
from .model_trials import logits_in

MASKED = 0.15  # of the real tokens that are not special; Devlin et al. 2019 (arXiv 1810.04805), section 3.1
CHUNK = 2**21  # logits read at a time: so few that they stay in a processor's cache
QUALITY = ("agreement", "accuracy", "loss")


@dataclass
class Prediction(Task):
    """A choice among classes at each scored position. Here: one for each sample, such as its label.

    labels: the right class of each sample, by its number; None where it is not known
    """

    model: Any
    samples: Samples
    labels: list[int] | None = None
    name: str = "classification"
    metrics: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = QUALITY if self.labels is not None else ("agreement",)

    def prepare(self, batch: Batch) -> Prepared:
        prepared = whole(batch)
        if self.labels is None:
            return prepared
        targets = torch.tensor([self.labels[i] for i in prepared.samples], device=prepared.row.device)
        return replace(prepared, targets=targets)

    def head(self, output: Any) -> Tensor:
        found = output if isinstance(output, Tensor) else logits_in(output)
        if found is None:
            raise RcProbeError("the output holds no logits", where=type(self.model).__name__)
        return found

    def read(self, output: Any, prepared: Prepared) -> Readout:
        """prediction: (P,) the class of the largest logit; log_prob: (P,) of the target, in nats, if there is one."""
        logits, targets = self.head(output).detach(), prepared.targets
        chosen, log_prob = [], []
        step = max(1, CHUNK // logits.shape[-1])
        for start in range(0, len(prepared.row), step):
            part = slice(start, start + step)
            found = logits[_at(prepared, part, logits.device)]  # (P, classes)
            found = found if found.dtype == torch.float64 else found.float()
            total = found.logsumexp(-1)
            self._check(total)
            chosen.append(found.argmax(-1))
            if targets is not None:
                right = found.gather(-1, targets[part, None].to(found.device)).squeeze(-1)
                self._check(right)
                log_prob.append((right - total).double())
        none = [logits.new_zeros(0, dtype=torch.long)]
        readout = {"prediction": torch.cat(chosen or none).cpu()}
        if targets is not None:
            readout["log_prob"] = torch.cat(log_prob or none).double().cpu()
        return readout

    def _check(self, values: Tensor) -> None:
        if not bool(values.isfinite().all()):
            what = "its head gives NaN or infinity"
            raise RcProbeError(what, where=type(self.model).__name__, todo="Try --dtype float32")

    def tally(self) -> PredictionTally:
        return PredictionTally(self)


@dataclass
class TokenClasses(Prediction):
    """A label for each real token that is not special."""

    special: frozenset[int] = frozenset()
    name: str = "token classification"

    def prepare(self, batch: Batch) -> Prepared:
        row, column = torch.nonzero(
            _plain(batch.inputs["input_ids"], batch.mask, self.special), as_tuple=True
        )
        return replace(whole(batch), row=row, column=column)


@dataclass
class NextToken(Prediction):
    """The next token, at each real token that has a real one after it which is not special.

    shifted: the decoder reads the text one behind, so that its output at a token is about that token
    """

    special: frozenset[int] = frozenset()
    shifted: bool = False
    name: str = "next token"

    def __post_init__(self) -> None:
        self.metrics = QUALITY

    def prepare(self, batch: Batch) -> Prepared:
        ids = batch.inputs["input_ids"]
        wanted = _plain(ids, batch.mask, self.special)
        behind = 0 if self.shifted else 1
        row, column = torch.nonzero(wanted[:, behind:], as_tuple=True)
        return replace(whole(batch), row=row, column=column, targets=ids[row, column + behind])


@dataclass
class MaskedToken(Prediction):
    """The tokens behind masks: 15 % of the real tokens that are not special, at least one, of each text.

    Each of them is replaced by the mask token. (Pretraining leaves a fifth of them as they are or replaces them at
    random; to predict what stands there is another task.) Which ones depends on the text and the seed alone.
    """

    special: frozenset[int] = frozenset()
    mask_id: int = 0
    seed: int = 0
    name: str = "masked token"

    def __post_init__(self) -> None:
        self.metrics = QUALITY

    def prepare(self, batch: Batch) -> Prepared:
        ids = batch.inputs["input_ids"]
        plain = _plain(ids, batch.mask, self.special).cpu().numpy()
        real = np.ones_like(plain) if batch.mask is None else batch.mask.cpu().numpy()
        hidden = np.zeros_like(plain)
        for i, text in enumerate(ids.cpu().numpy()):
            (places,) = plain[i].nonzero()
            if len(places):
                random = np.random.default_rng([self.seed, *text[real[i]].tolist()])
                count = max(1, round(MASKED * len(places)))
                hidden[i, random.choice(places, count, replace=False)] = True
        where = torch.from_numpy(hidden).to(ids.device)
        row, column = torch.nonzero(where, as_tuple=True)
        inputs = {**batch.inputs, "input_ids": ids.masked_fill(where, self.mask_id)}
        return replace(whole(batch), inputs=inputs, row=row, column=column, targets=ids[row, column])


class PredictionTally(Tally):
    """agreement: share of a sample's positions where the class is the full model's; accuracy: where it is the right
    one; loss: mean −log p of the right one, in nats."""

    _COUNTS = "predictions"  # key of how many each sample has

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._chosen: Counter[int] = Counter()  # by the full model; each sample weighs 1
        self._right: Counter[int] = Counter()
        self._targets: Counter[int] = Counter()  # each token weighs 1

    def _begin(self) -> None:
        prepared = self._prepared
        self._row = prepared.row.cpu()
        self._counts = torch.bincount(self._row, minlength=prepared.rows).double()
        self._put(self._COUNTS, {"count": self._counts[self._counts > 0]})
        weight = 1 / self._counts[self._row]
        _weigh(self._chosen, self._reference["prediction"], weight)
        if prepared.targets is not None:
            _weigh(self._right, prepared.targets.cpu(), weight)
            _weigh(self._targets, prepared.targets.cpu(), torch.ones_like(weight))

    def _keep(self, key: Hashable, readout: Readout) -> None:
        chosen, targets = readout["prediction"], self._prepared.targets
        values = {"agreement": chosen == self._reference["prediction"]}
        if targets is not None:
            values |= {"accuracy": chosen == targets.cpu(), "loss": -readout["log_prob"]}
        self._put(key, {name: self._means(value.double()) for name, value in values.items()})

    def _means(self, values: Tensor) -> Tensor:
        """(P,) -> the mean of each sample that has a position."""
        sums = torch.zeros(len(self._counts), dtype=torch.float64).index_add(0, self._row, values)
        scored = self._counts > 0
        return sums[scored] / self._counts[scored]

    def merge(self, other: Tally) -> None:
        super().merge(other)
        assert isinstance(other, PredictionTally)
        self._chosen.update(other._chosen)
        self._right.update(other._right)
        self._targets.update(other._targets)

    def scores(self) -> dict[Hashable, dict[str, Tensor]]:
        found = self._joined()
        found.pop(self._COUNTS, None)
        return found

    def counts(self) -> Tensor:
        return self._joined()[self._COUNTS]["count"]

    def baselines(self) -> dict[str, float]:
        """agreement, accuracy: of the best constant class, samples weighing alike, as in the scores; loss: of the best
        constant distribution over all targets, its entropy."""
        found = {"agreement": max(_shares(self._chosen), default=0.0)}
        if self._right:
            loss = -sum(p * log(p) for p in _shares(self._targets))
            found |= {"accuracy": max(_shares(self._right)), "loss": loss}
        return found


def _plain(ids: Tensor, mask: Tensor | None, special: frozenset[int]) -> Tensor:
    """(B, T): real tokens that are not special."""
    plain = ~torch.isin(ids, torch.tensor(sorted(special), device=ids.device, dtype=ids.dtype))
    return plain if mask is None else plain & mask


def _at(prepared: Prepared, part: slice, device: Any) -> tuple[Tensor, ...]:
    row = prepared.row[part].to(device)
    return (row,) if prepared.column is None else (row, prepared.column[part].to(device))


def _weigh(counter: Counter[int], classes: Tensor, weight: Tensor) -> None:
    for value, w in zip(classes.tolist(), weight.tolist(), strict=True):
        counter[value] += w


def _shares(counter: Counter[int]) -> list[float]:
    total = sum(counter.values())
    return [weight / total for weight in counter.values()]
