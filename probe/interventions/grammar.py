"""The one parser of specs: `attention.skip@3-5`, `head@2:5`, `mlp=0.5`, `mlp@1+mlp@2`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rc_probe.hooks.errors import RcProbeError
from rc_probe.options import in_python

from . import KINDS
from .intervention import FORM, Intervention, Spec, Variant

if TYPE_CHECKING:
    from rc_probe.hooks.edits.gates import Gate

MOST = 9999  # blocks or heads: no model has more
# A value may hold colons, commas and signs: `mask@all=sink:4,window:64`. The next part begins behind a +.
_NEXT = re.compile(r"\+(?=\s*[A-Za-z_])")
_SPEC = re.compile(r"(?P<part>[^@:=]+)(@(?P<blocks>[^:=]+))?(:(?P<heads>[^=]+))?(=(?P<value>.+))?", re.DOTALL)


def parts() -> dict[str, type[Intervention]]:
    """The kind of each PART."""
    return {part: kind for kind in KINDS for part in kind.parts}


def parse_intervention(text: str) -> Variant:
    """One spec, or several joined by `+`, as a variant named by the text.

    Raises RcProbeError, with the nearest PART where one is misspelt.

    >>> parse_intervention("head@2:5=0.5").interventions
    (Gated(part='head', blocks=(2,), heads=(5,), value=0.5),)
    """
    if not isinstance(text, str):
        raise RcProbeError(f"{text!r} is not an intervention", where="ablate", todo=f"Write {FORM}")
    return Variant(text, tuple(_parse_one(text, part.strip()) for part in _NEXT.split(text)))


def interventions(*what: str | Intervention | Gate | Iterable[str | Intervention | Gate]) -> Variant:
    """What Python code may give: specs, `Gate`s, interventions, or lists of them, as one variant."""
    from rc_probe.hooks.edits.gates import Gate

    found: list[Intervention] = []
    for item in what:
        if isinstance(item, list | tuple):
            found += interventions(*item).interventions
        elif isinstance(item, Intervention):
            found.append(item)
        elif isinstance(item, Gate):
            kind = parts()[item.component]
            found.append(kind(item.component, item.blocks, item.heads, item.value))
        else:
            try:
                found += parse_intervention(item).interventions  # type: ignore[arg-type]  # it refuses what is no text
            except RcProbeError as error:
                raise in_python(error) from error
    return Variant("+".join(each.label for each in found), tuple(found))


def _parse_one(whole: str, text: str) -> Intervention:
    match = _SPEC.fullmatch(text)
    if not match:
        raise Spec(whole, text).error(f"{text!r} is not an intervention")
    part, blocks, heads, value = (
        found and found.strip() for found in match.group("part", "blocks", "heads", "value")
    )
    spec = Spec(whole, part)
    known = parts()
    if part not in known:
        near = difflib.get_close_matches(part, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise spec.error(f"there is no part {part!r}{hint}", f"Parts: {', '.join(known)}")
    numbers = (
        None if blocks in (None, "all") else _numbers(spec, blocks),
        _numbers(spec, heads) if heads else (),
    )
    return known[part].parse(Spec(whole, part, *numbers, value))


def _numbers(spec: Spec, text: str) -> tuple[int, ...]:
    """`3`, `3-5`, `1,4-6` as numbers from 1."""
    numbers: list[int] = []
    for part in text.split(","):
        ends = part.strip().split("-")
        if len(ends) > 2 or not all(end.isascii() and end.isdigit() for end in ends):
            raise spec.error(f"{part.strip()!r} is not a number or a range such as 3-5")
        if any(len(end) > len(str(MOST)) or int(end) > MOST for end in ends):
            raise spec.error(f"{part.strip()!r} is beyond {MOST:,}", "Give numbers of blocks or heads")
        first, last = int(ends[0]), int(ends[-1])
        if last < first:
            raise spec.error(f"the range {part.strip()!r} runs backwards")
        numbers += range(first, last + 1)
    return tuple(dict.fromkeys(numbers))
