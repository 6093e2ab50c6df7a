"""Paths: how much of the output comes from paths through 0, 1, 2 … attention heads."""

from .decompose import Decomposition, decompose
from .live import live
from .sample import sample, terms

__all__ = ["Decomposition", "decompose", "live", "sample", "terms"]
