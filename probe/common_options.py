"""The options of every run: which model, which data, which weights. What is measured brings its own (`measures`)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from rc_probe.hooks.errors import RcProbeError

from .options import Options, flag, option

DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")
MOST_SEED = 2**63  # what random generators take
MODEL, DATA = "The model", "The data"
DATA_HELP = (
    "A txt, jsonl, json, csv, tsv or parquet file, a folder of images or of sounds (wav, flac, ogg, mp3), a Hub "
    "dataset name[:config][:split], or lm-eval:TASK. (default: bundled biographies or photographs)"
)
STACK_HELP = (
    "Encoder, decoder or tower, by its name or a part of it: 'encoder', 'vision'. (default: the last)"
)
MAP_HELP = "For a model larger than one GPU: auto, balanced, balanced_low_0, sequential, or a JSON file of {module: device}."
BLOCKS_HELP = "Names of the blocks, where they are not found: 'encoder.layer.*'."
LABEL_HELP = (
    "Column with the correct answers: a class by name or number; for embeddings also a paired text, or TEXT,SCORE. Of a folder "
    "of images or sounds: 'folder', the names of the folders in it."
)
SAMPLES_HELP = "Texts, images or sounds at most. (default: 32, of demo-decoder 16)"
DTYPE_HELP = "float32, float64, bfloat16, float16; auto is the one of the checkpoint's weights."
DEVICE_HELP = "cpu, cuda, cuda:1 … (default: cuda if there is one)"
REVISION_HELP = "Branch, tag or commit of a Hub model."
OFFLOAD_HELP = "For what the device map puts on disk."
INIT_HELP = "Also measure the same architecture freshly initialised."


@dataclass(frozen=True)
class ModelAndData(Options):
    """Which model, which data. None: what is found, or the default of the library."""

    revision: str | None = option(None, REVISION_HELP, panel=MODEL)
    dtype: str = option("auto", DTYPE_HELP, panel=MODEL)
    device: str | None = option(None, DEVICE_HELP, panel=MODEL)
    device_map: Any = option(None, MAP_HELP, panel=MODEL, typed=str | None)  # from Python also a dict
    offload_folder: str | None = option(None, OFFLOAD_HELP, panel=MODEL)
    allow_pickle: bool = option(False, "Also load pickled weights, which can run code.", panel=MODEL,
                                flags=("--allow-pickle",))  # fmt: skip
    trust_remote_code: bool = option(
        False, "Run the model's own code.", panel=MODEL, flags=("--trust-remote-code",)
    )
    stack: str | None = option(None, STACK_HELP, panel=MODEL)
    blocks: str | None = option(None, BLOCKS_HELP, panel=MODEL)
    data: Any = option(
        None, DATA_HELP, panel=DATA, typed=str | None
    )  # from Python also lists, datasets, frames
    column: str | None = option(None, "Column of a table or dataset.", panel=DATA)
    label_column: str | None = option(None, LABEL_HELP, panel=DATA)
    samples: int | None = option(None, SAMPLES_HELP, panel=DATA, least=1)
    length: int = option(128, "Tokens of a text at most.", panel=DATA, least=2)
    batch_size: int = option(
        8, "Samples in one forward pass. Changes no number beyond rounding.", panel=DATA, least=1
    )
    special_tokens: bool = option(True, "Keep [CLS], [SEP] and the like in the text.", panel=DATA)

    def check(self) -> None:
        super().check()
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, str) and not value:
                raise RcProbeError("it is empty", where=flag(each), todo="Give a name, or leave it out")
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


@dataclass(frozen=True)
class CommonOptions(ModelAndData):
    """How to run."""

    init: bool = option(True, INIT_HELP)
    init_seeds: int = option(1, "How many initialisations.", least=1)
    seed: int = option(0, "Seed of the first.", least=0)

    def check(self) -> None:
        super().check()
        if self.seed + self.init_seeds > MOST_SEED:
            raise RcProbeError(
                f"{self.seed} is too large", where="--seed", todo=f"Give less than {MOST_SEED}"
            )
        if self.init_seeds > 1 and not self.init:
            what = "it changes nothing: fresh weights are not measured"
            raise RcProbeError(what, where="--init-seeds", todo="Add --init")
