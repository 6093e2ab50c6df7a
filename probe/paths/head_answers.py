"""What the model's own head answers to streams of its last layer: at the scored positions alone, where it can be asked so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rc_probe.hooks.edits.model_head import ModelHead, NarrowHead
from rc_probe.hooks.structure.structure import Structure
from rc_probe.tasks import Prepared, Readout, Task
from rc_probe.tasks.narrow import narrowed, words_of

CHUNK = 2**26  # scores of words that the head makes at a time


class HeadAnswers:
    """The answers on one batch, of which the plain pass runs at once, unless what its blocks returned is given.

    >>> answers = HeadAnswers(structure, task, task.prepare(batch), narrow)          # doctest: +SKIP
    >>> with answers.asking():                                                         # doctest: +SKIP
    ...     tally.resume(answers.prepared, answers.plain)
    ...     tally.put("without biases", answers.to(stream))

    stream: (batch, tokens, dim) after the last block, of the plain pass
    narrow: makes the head run at given positions; None where it runs at all of them
    """

    def __init__(
        self,
        structure: Structure,
        task: Task,
        prepared: Prepared,
        narrow: NarrowHead | None,
        outputs: dict[int, Any] | None = None,
        stream: Tensor | None = None,
    ) -> None:
        self.task, self.prepared, self.narrow = task, prepared, narrow
        with narrow.installed() if narrow else nullcontext():
            self._look_at(slice(0, 1))  # what the head says is asked later
            self._head = ModelHead(structure, dict(prepared.inputs), task.model, outputs)
        self.stream = self._head.stream if stream is None else stream
        self._last: tuple[Tensor, Readout] | None = None

    @contextmanager
    def asking(self) -> Iterator[None]:
        """While it is open the head can be asked: no block of the model runs."""
        with self.narrow.installed() if self.narrow else nullcontext(), self._head:
            yield

    @cached_property
    def plain(self) -> Readout:
        """What the task reads of the plain output."""
        whole = self._head.plain
        return self.to(self.stream) if self.narrow or whole is None else self.task.read(whole, self.prepared)

    def to(self, stream: Tensor) -> Readout:
        """What it reads of the output with `stream` (batch, tokens, dim) after the last block; asked again, the same."""
        if self._last is None or self._last[0] is not stream:
            self._last = stream, self._asked(stream)
        return self._last[1]

    def _asked(self, stream: Tensor) -> Readout:
        if self.narrow is None:
            return self.task.read(self._head(stream), self.prepared)
        step = max(1, CHUNK // max(1, words_of(self.task)))
        found = []
        for start in range(0, max(1, len(self.prepared.row)), step):
            part = self._look_at(slice(start, start + step))
            found.append(self.task.read(self._head(stream), part))
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}

    def _look_at(self, which: slice) -> Prepared:
        """The head runs at these of the scored positions; where their answers are in what it gives."""
        if self.narrow is None or self.prepared.column is None:
            return self.prepared
        part = self.prepared.at(which)
        assert part.column is not None
        self.narrow.at = part.row, part.column
        return narrowed(part)
