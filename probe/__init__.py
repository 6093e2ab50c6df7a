"""rc-probe: measure rank collapse in any Hugging Face transformer, and see what holds it up.

The public names are imported on first use, so that `import rc_probe` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "RcProbeError": "rc_probe.hooks.errors",
    "attach": "rc_probe.contexts",
    "ablate": "rc_probe.contexts",
    "probe": "rc_probe.api",
    "compare": "rc_probe.comparison",
    "ProbeResult": "rc_probe.results",
    "METRICS": "rc_probe.registry",
    "Gate": "rc_probe.hooks.gates",
    "Monitor": "rc_probe.monitor",
    "watch": "rc_probe.training",
}

__all__ = [
    "METRICS", "Gate", "Monitor", "ProbeResult", "RcProbeError", "__version__", "ablate", "attach", "compare", "probe",
    "watch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "paths":
        return import_module("rc_probe.paths")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rc_probe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
