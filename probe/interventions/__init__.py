"""What can be changed in a model: one file per kind of intervention, all listed here."""

from .gate import Gated
from .intervention import Intervention
from .mask import Masked
from .norm import Normed
from .pattern import Pattern
from .rank import Ranked
from .temperature import Temperature

KINDS: tuple[type[Intervention], ...] = (Gated, Masked, Normed, Temperature, Pattern, Ranked)
