"""What can be chosen about a measurement. No torch here: `rc-probe --help` reads it."""

from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, Self

from rc_probe.hooks.errors import RcProbeError

from .registry import METRICS, select

DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")
LEAST = {
    "samples": 1, "length": 2, "batch_size": 1, "svd_samples": 0, "init_seeds": 1, "seed": 0,
    "repeats": 2, "path_samples": 1,
}  # fmt: skip
MOST_SEED = 2**63  # what random generators take


@dataclass(frozen=True)
class Settings:
    """How to measure. Each field is an option of the command and of `rc_probe.probe`."""

    data: Any = None  # a file, a folder, a Hub dataset, Python objects; None: the bundled samples
    revision: str | None = None  # of a Hub model
    dtype: str = "float32"
    device: str | None = None  # None: CUDA where there is one
    device_map: Any = None  # over several devices: a name of accelerate's, a JSON file, a dict
    offload_folder: str | None = None  # for what the device map puts on disk
    allow_pickle: bool = False
    trust_remote_code: bool = False
    stack: str | None = None  # which stack of blocks, by name; None: the last
    blocks: str | None = None  # names of the blocks, where they are not found
    column: str | None = None  # of a table or a dataset
    label_column: str | None = None  # of what is right: classes, a paired text, "text,similarity", "folder"
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
    paths: bool = True  # what paths of each length do, and chained attention
    path_draws: tuple[
        int, ...
    ] = ()  # paths drawn at each length for an estimate; none: the exact numbers alone
    repeats: int = 5  # estimates of each kind
    path_samples: int = 16  # the first of the samples, that paths are measured on
    max_length: int | None = None  # longer paths are one part; None: 8 in models of more than 12 blocks
    count_mlp: bool = False  # an MLP is a hop of a path

    def __post_init__(self) -> None:
        for name in ("metrics", "ablate"):  # one text may stand for a tuple of one
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if isinstance(self.path_draws, int):
            object.__setattr__(self, "path_draws", (self.path_draws,))

    @classmethod
    def of(cls, **options: Any) -> Self:
        """Settings from a caller's options; RcProbeError for a name that is not an option."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                todo = f"There are {', '.join(known)}"
                raise RcProbeError(f"no option is called {name!r}", where="probe", todo=todo)
        return cls(**options)

    @property
    def measured(self) -> list[str]:
        """The metrics to measure, in display order; without `svd_samples` the cheap ones alone."""
        return [name for name in select(self.metrics) if self.svd_samples or METRICS[name].cost == "cheap"]

    def words(self, model: str) -> list[str]:
        """The command line that measures `model` with these settings: every field that differs from its default."""
        words = ["rc-probe", model]
        for field in fields(self):
            value = getattr(self, field.name)
            option = f"--{field.name.replace('_', '-')}"
            if value == field.default or field.name == "path_draws":
                continue
            if isinstance(value, bool):
                words.append(option if value else option.replace("--", "--no-", 1))
            elif field.name == "ablate":
                words += [word for text in value for word in (option, text)]
            elif field.name == "metrics":
                words += [option, ",".join(value)]
            elif isinstance(value, str | int):
                words += [option, str(value)]
            else:
                words += [option, f"{field.name.replace('_', '-').upper()}-GIVEN-IN-PYTHON"]
        drawn = ["--paths", *map(str, self.path_draws)] if self.path_draws and self.paths else []
        return [*words, *drawn]

    def check(self) -> None:
        """RcProbeError, naming the option, for what no model and no data could make right."""
        for name, least in LEAST.items():
            _at_least(f"--{name.replace('_', '-')}", getattr(self, name), least)
        self._check_paths()
        if self.seed + self.init_seeds > MOST_SEED:
            raise RcProbeError(
                f"{self.seed} is too large", where="--seed", todo=f"Give less than {MOST_SEED}"
            )
        for name in ("stack", "blocks", "label_column"):
            if getattr(self, name) == "":
                where = f"--{name.replace('_', '-')}"
                raise RcProbeError("it is empty", where=where, todo="Give a name, or leave it out")
        if self.stack is not None and self.blocks is not None:
            todo = "--blocks names the blocks of one stack by itself"
            raise RcProbeError("both are given", where="--stack, --blocks", todo=todo)
        if self.device_map is not None and self.device is not None:
            todo = "The device map says where each part goes"
            raise RcProbeError("both are given", where="--device, --device-map", todo=todo)
        if self.offload_folder is not None and self.device_map is None:
            todo = "Add --device-map auto"
            raise RcProbeError(
                "nothing is offloaded without a device map", where="--offload-folder", todo=todo
            )
        if self.dtype not in DTYPES:
            todo = f"Choose one of {', '.join(DTYPES)}"
            raise RcProbeError(f"no such dtype {self.dtype!r}", where="--dtype", todo=todo)
        if not self.measured:
            todo = "Name one, or raise --svd-samples"
            raise RcProbeError("no metric is left to measure", where="--metrics", todo=todo)

    def _check_paths(self) -> None:
        for number in self.path_draws:
            _at_least("--paths", number, 1)
        if self.max_length is not None:
            _at_least("--max-length", self.max_length, 0)


def _at_least(option: str, value: Any, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise RcProbeError(f"{value!r} is not a whole number", where=option, todo=f"Give {least} or more")
    if value < least:
        raise RcProbeError(f"{value} is too small", where=option, todo=f"Give at least {least}")
