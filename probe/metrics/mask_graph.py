"""The graph of an attention mask, and what it promises: Wu et al. 2024 (arXiv 2405.18781), theorem without norms.

A token j is a node; there is an edge from j to i where i may see j. A center reaches every node; the radius is the least
number of steps r that a center needs for it. With a loop at every node and weights of at least ε on the edges, a product of
r patterns has entries ≥ ε^r in the whole column of each of the c centers that need no more steps, so that its Dobrushin
coefficient is at most 1 − c ε^r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskGraph:
    """edges: share of all pairs; centers: how many; radius: None without centers; nearest: centers that need no more steps

    loops: whether each token sees itself
    """

    tokens: int
    edges: float
    centers: int
    radius: int | None
    nearest: int
    loops: bool

    @classmethod
    def of(cls, seen: Tensor) -> MaskGraph:
        """From seen (tokens, tokens): whether query i may see key j.

        >>> MaskGraph.of(torch.ones(4, 4).bool().tril())
        MaskGraph(tokens=4, edges=0.625, centers=1, radius=1, nearest=1, loops=True)
        """
        tokens = len(seen)
        eye = torch.eye(tokens, dtype=torch.bool, device=seen.device)
        step = (seen | eye).float()
        reached, reach = step, 1
        steps = torch.where(reached.bool().all(0), 1, 0)  # by node, to all others; 0: not yet
        while reach < tokens and not bool(steps.all()):
            further = ((step @ reached) > 0).float()
            if torch.equal(further, reached):
                break
            reached, reach = further, reach + 1
            steps = torch.where((steps == 0) & reached.bool().all(0), reach, steps)
        centers = int((steps > 0).sum())
        radius = int(steps[steps > 0].min()) if centers else None
        nearest = int(torch.count_nonzero(steps == radius)) if radius else 0
        return cls(tokens, float(seen.double().mean()), centers, radius, nearest, bool(seen.diagonal().all()))

    def bound(self, least: float, patterns: int) -> float:
        """What the Dobrushin coefficient of a product of so many patterns cannot exceed; 1 where nothing is promised.

        least: ε, the smallest weight on an edge of any of them
        """
        if not (self.loops and self.radius) or least <= 0:
            return 1.0
        gain = self.nearest * least**self.radius
        if gain >= 1:  # uniform attention: after rounding, at once
            return 0.0
        return math.exp(patterns // self.radius * math.log1p(-gain))

    def why_nothing(self, least: float, patterns: int) -> str:
        """Why `bound` promises nothing; "" where it does, however little."""
        if not self.loops:
            return "not every token sees itself"
        if self.radius is None:
            return "no token reaches all others"
        if patterns < self.radius:
            return f"a center needs {self.radius} blocks to reach all others"
        return "" if least > 0 else "the smallest weight on an edge is 0"
