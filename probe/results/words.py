"""What the report reads of a result, and numbers as it writes them."""

import math
from typing import Any

from .protocols import Result

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

WEIGHTS = {"pretrained": "Pretrained", "init": "Freshly initialised"}
THINGS = {"text": "texts", "image": "images", "audio": "sounds"}  # what samples are called, by modality


def one_line(text: Any) -> str:
    """`text` without line breaks: on GitHub a line that begins with :: is a command."""
    return " ".join(str(text).splitlines())


def many(count: int, things: str) -> str:
    """`1 layer`, `12 layers`."""
    return f"{count:,} {things[:-1] if count == 1 else things}"


def power_of_ten(exponent: int) -> str:
    """`10⁻⁷` for -7."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def number(value: Any, digits: int = 2) -> str:
    """`value` for reading, to `digits` significant ones: `2.0×10⁻⁷` where very small, `–` where missing."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    exponent = int(power)
    if -4 < exponent < 6:
        return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")
    return f"{mantissa}×{power_of_ten(exponent)}".replace("-", "−")


def signed(change: float, digits: int = 2) -> str:
    """A change for reading, as `number` writes it: `+0.12`, `−0.12`, `0`."""
    return ("+" if change > 0 else "") + number(change, digits)


def name_of(result: Result) -> str:
    """The model's name for reading: the last part of its id."""
    name = str(result.model.get("id") or result.model.get("class") or "the model")
    return name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] or name
