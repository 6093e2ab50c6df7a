"""From a source of data to batches: texts, images and sounds."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load_samples":
        from .samples import load_samples

        return load_samples
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
