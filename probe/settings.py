"""What can be chosen about a measurement. No torch here: `rc-probe --help` reads it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """How to measure. Each field is an option of the command and of `rc_probe.probe`."""

    data: Any = None  # a file, a folder, a Hub dataset, Python objects; None: the bundled samples
    column: str | None = None  # of a table or a dataset
    samples: int = 32
    length: int = 128  # tokens of a text at most
    batch_size: int = 8
    special_tokens: bool = True
    metrics: tuple[str, ...] | None = None  # None: the registry's defaults
    svd_samples: int = 4  # samples that the slow metrics are measured on
    init: bool = True  # measure freshly initialised weights, too
    init_seeds: int = 1  # how many
    seed: int = 0  # of the first
    ablate: tuple[str, ...] = ()
    recursion: bool = True  # the pure attention variant below the float floor
