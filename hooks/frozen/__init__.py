"""The frozen network: patterns, norm scales and gates held, the stream kept as a sum of parts."""

from . import rules_held, rules_maps, rules_moves
from .parts import FREEZING, RULES

RULES.update(rules_moves.rule | rules_maps.rule | rules_held.rule)
FREEZING.update(rules_held.FREEZING)
