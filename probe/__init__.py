"""rc-probe: measure rank collapse in any Hugging Face transformer, and see what holds it up.

The public names are imported on first use, so that `import rc_probe` costs nothing.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "RcProbeError": "rc_probe.hooks.errors",
    "attach": "rc_probe.contexts",
    "ablate": "rc_probe.contexts",
    "probe": "rc_probe.api",
    "compare": "rc_probe.comparison",
    "diff": "rc_probe.difference.diff",
    "ProbeResult": "rc_probe.result",
    "METRICS": "rc_probe.registry",
    "Gate": "rc_probe.hooks.edits.gates",
    "Monitor": "rc_probe.integrations.monitor",
    "watch": "rc_probe.integrations.trainer",
}

__all__ = [
    "METRICS", "Gate", "Monitor", "ProbeResult", "RcProbeError", "__version__", "ablate", "attach", "compare", "diff",
    "probe", "watch",
]  # fmt: skip

_MOVED = {  # modules that earlier versions of the docs name: where they are now
    "rc_probe.batches": "rc_probe.data.batches",
    "rc_probe.chains": "rc_probe.measures.chained_attention",
    "rc_probe.counting": "rc_probe.paths.path_counts",
    "rc_probe.load": "rc_probe.models.load",
    "rc_probe.training": "rc_probe.integrations.trainer",
    "rc_probe.world": "rc_probe.processes.world",
}


class _Moved(MetaPathFinder, Loader):
    """Finds the modules of _MOVED under their old names, once nobody else has."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return spec_from_loader(name, self) if name in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(
            {k: v for k, v in vars(import_module(_MOVED[module.__name__])).items() if k[:2] != "__"}
        )


sys.meta_path.append(_Moved())


def __getattr__(name: str) -> Any:
    if name in ("experiments", "paths"):
        return import_module(f"rc_probe.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rc_probe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
