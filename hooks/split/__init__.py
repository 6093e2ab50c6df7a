"""Split arithmetic: the token mean and the residual carried apart, below the float floor."""

from . import rules, rules_attention
from .tensors import RULES

RULES.update(rules.rule | rules_attention.rule)
