"""Whether runs were measured on the same samples in the same way, and which of their layers correspond."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .protocols import Described

# Settings that decide what a curve is of, by the name that a reader knows. Batch size, device and dtype are not
# among them: the first changes nothing, the others are what a comparison may be about.
DECISIVE = {
    "kind of data": "modality", "samples": "samples", "length": "length", "special tokens": "special_tokens",
}  # fmt: skip
TOKENS = {"tokens measured": "tokens"}  # also decided by the tokenizer, which differs between models

Setting = Mapping[str, Any]
Pairs = list[tuple[int, int]]  # (layer of the one, layer of the other), from layer 0 on


def unlike(runs: Sequence[Setting], *, tokens: bool = False) -> dict[str, list[str]]:
    """What differs between the `settings` of runs, with each run's value in words; empty if they are alike.

    tokens: also how many tokens the samples became, for versions of one model
    """
    found = {} if _same_data(runs) else {"data": [_data(run) for run in runs]}
    for name, key in (DECISIVE | (TOKENS if tokens else {})).items():
        if any(run.get(key) != runs[0].get(key) for run in runs):
            found[name] = [_word(run.get(key)) for run in runs]
    return found


def _same_data(runs: Sequence[Setting]) -> bool:
    """By what the samples hold, and where that is not known by where they are from."""
    key = "digest" if all(run.get("digest") for run in runs) else "data"
    return all(run.get(key) == runs[0].get(key) for run in runs)


def _data(run: Setting) -> str:
    digest = str(run.get("digest") or "")[:8]
    return f"{run.get('data', 'unknown')}{f' ({digest}…)' if digest else ''}"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "unknown" if value is None else str(value)


def aligned(one: Described, other: Described) -> Pairs | None:
    """The layers that correspond; None where that is not known.

    All in turn where both are as deep. Else the blocks of the one have to be those of the other but for some that are
    left out, each known by its weights.
    """
    depths = one.model.get("blocks"), other.model.get("blocks")
    if depths[0] == depths[1] and isinstance(depths[0], int):
        return [(layer, layer) for layer in range(depths[0] + 1)]
    mine, theirs = (_digests(result) for result in (one, other))
    if mine is None or theirs is None:
        return None
    if len(mine) > len(theirs):
        swapped = _places(theirs, mine)
        return swapped and [(layer, place) for place, layer in swapped]
    return _places(mine, theirs)


def _digests(result: Described) -> list[str] | None:
    found = result.model.get("block_digests")
    known = (
        isinstance(found, list)
        and len(found) == result.model.get("blocks")
        and all(isinstance(d, str) for d in found)
    )
    return found if known else None


def _places(few: list[str], many: list[str]) -> Pairs | None:
    """Where the blocks `few` stand among `many`, in the same order; None where they do not, or it is not clear."""
    if len(set(many)) < len(many) or not set(few) <= set(many):
        return None
    places = [many.index(digest) for digest in few]
    if places != sorted(set(places)):
        return None
    return [(0, 0), *((number, place + 1) for number, place in enumerate(places, 1))]
