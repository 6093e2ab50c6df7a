"""Whether runs were measured on the same samples in the same way, so that their curves can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Settings that decide what a curve is of, by the name that a reader knows. Batch size, device and dtype are not
# among them: the first changes nothing, the others are what a comparison may be about.
DECISIVE = {
    "kind of data": "modality", "samples": "samples", "length": "length", "special tokens": "special_tokens",
}  # fmt: skip
TOKENS = {"tokens measured": "tokens"}  # also decided by the tokenizer, which differs between models

Setting = Mapping[str, Any]


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
