"""What a user asks for: a spec `PART[@BLOCKS[:HEADS]][=VALUE]`, taken apart, and what each kind makes of it.

No torch is imported here or in a kind's file before `edits`: `rc-probe --help` reads the kinds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from rc_probe.hooks.errors import RcProbeError

if TYPE_CHECKING:
    from rc_probe.hooks.edits.edits import Edits
    from rc_probe.hooks.structure.structure import Structure

FORM = "PART[@BLOCKS[:HEADS]][=VALUE], for example attention.skip@3-5, mlp@7, attention@all, head@2:5"


@dataclass(frozen=True)
class Spec:
    """One spec, taken apart by the grammar. value: the text after `=`, None where there is none.

    whole: all that the user wrote, for errors
    """

    whole: str
    part: str
    blocks: tuple[int, ...] | None = None
    heads: tuple[int, ...] = ()
    value: str | None = None

    def error(self, what: str, todo: str = f"Write {FORM}") -> RcProbeError:
        """What is wrong with it, in one line."""
        return RcProbeError(what, where=f"--ablate {self.whole}", todo=todo)


@dataclass(frozen=True)
class Intervention:
    """One change to the model. A kind is a subclass in a file of its own, listed in `KINDS`.

    part: one of the kind's `parts`. blocks, heads: numbers from 1; None, or none, where they are not named

    >>> parse_intervention("mlp@3-5").interventions[0].label
    'mlp@3-5'
    """

    part: str
    blocks: tuple[int, ...] | None = None
    heads: tuple[int, ...] = ()
    value: Any = None

    parts: ClassVar[Mapping[str, str]] = {}  # the PARTs of this kind, and what each means
    sweep: ClassVar[tuple[str, ...]] = ()  # the values of a map, where none are named
    own: ClassVar[Any] = None  # the value with which the model is as it is; None: there is none

    @classmethod
    def parse(cls, spec: Spec) -> Self:
        """The intervention of a spec whose PART is one of `parts`. Raises `spec.error(...)` for a wrong value."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """The spec that asks for it."""
        heads = f":{span(self.heads)}" if self.heads else ""
        value = "" if self.value is None else f"={self.value}"
        return f"{self.part}@{span(self.blocks)}{heads}{value}"

    @property
    def on_data(self) -> bool:
        """Whether plain passes over the data have to be read first: see `engine.prepare`."""
        return False

    @classmethod
    def reading(cls, structure: Structure, given: Sequence[Intervention]) -> Any:
        """For those of this kind that are `on_data`: a reader with `edits`, `sums` of this process and `keep(sums of all)`."""
        raise NotImplementedError

    def edits(self, structure: Structure) -> Edits:
        """What it does to this model. Raises RcProbeError where the model has no such part, block or head."""
        raise NotImplementedError


@dataclass(frozen=True)
class Variant:
    """A named list of interventions; `transformer`, the model as it is, has none."""

    name: str
    interventions: tuple[Intervention, ...] = ()

    def edits(self, structure: Structure) -> Edits:
        """All of them at once, in their order. Raises RcProbeError where the model's blocks mix several streams."""
        from rc_probe.hooks.edits.edits import Edits
        from rc_probe.hooks.structure.side_by_side import mixed_streams

        if self.interventions and structure.mixed:
            raise mixed_streams(structure.streams, structure.model)
        whole = Edits()
        for each in self.interventions:
            whole = whole.then(each.edits(structure))
        return whole


def number(spec: Spec, todo: str = f"Write {FORM}") -> float:
    """The value of a spec as a finite number, or the error that says so."""
    return finite(spec.value or "", spec, todo)


def finite(text: str, spec: Spec, todo: str) -> float:
    """A text as a finite number, or the error of the spec that says so."""
    try:
        value = float(text)
    except ValueError:
        raise spec.error(f"{text!r} is not a number", todo) from None
    if not math.isfinite(value):
        raise spec.error(f"{text!r} is not a finite number", todo)
    return value


def span(numbers: tuple[int, ...] | None) -> str:
    """Block or head numbers as short text: `all`, `7`, `3-5`, `1,4-6`."""
    if numbers is None:
        return "all"
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
