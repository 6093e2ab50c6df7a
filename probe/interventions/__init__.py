"""What can be changed in a model: one file per kind of intervention, all listed here."""

from .gate import Gated
from .intervention import Intervention

KINDS: tuple[type[Intervention], ...] = (Gated,)
