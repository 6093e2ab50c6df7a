"""`rc-probe experiment NAME`: the papers' small trained experiments."""

from .command import app

__all__ = ["app"]
