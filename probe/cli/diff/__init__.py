"""`rc-probe diff A B`: the difference of two models."""

from .command import app

__all__ = ["app"]
