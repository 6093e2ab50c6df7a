"""What one attention pattern does, in plain numpy loops: (queries, keys), and which keys each query may see."""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any

import numpy as np

Array = np.ndarray


def stochastic(rng: np.random.Generator, seen: Array, sharp: float = 2.0) -> Array:
    """A random pattern on a mask: rows that sum to one, positive exactly on its edges."""
    scores = np.where(seen, np.exp(sharp * rng.standard_normal(seen.shape)), 0)
    found: Array = scores / scores.sum(-1, keepdims=True)
    return found


def head(a: Array, seen: Array) -> dict[str, float]:
    """All metrics of one head on one sample; a metric that says nothing is not there."""
    entropies, variances, phases = [], [], []
    for row, allowed in zip(a, seen, strict=True):
        p = row[allowed] / row.sum()
        if len(p) >= 2:
            entropies.append(-sum(x * np.log(x) for x in p if x) / np.log(len(p)))
        if len(p) >= 8:
            variances.append(np.var(np.log(row[allowed])))
            phases.append(variances[-1] / (2 * np.log(len(p))))
    s = np.linalg.svd(a, compute_uv=False)
    got = list(received(a, seen).values())
    found = {
        "entropy": np.mean(entropies) if entropies else None,
        "sink": max(got) if got else None,
        "sink_share": float(max(got) > 0.3) if got else None,
        "logit_variance": np.mean(variances) if variances else None,
        "phase": np.sqrt(np.mean(phases)) if phases else None,
        "least_weight": a[seen].min(),
        "dobrushin": dobrushin(a),
        "singular_gap": s[0] / s[1],
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def dobrushin(a: Array) -> float:
    return float(max(abs(x - y).sum() for x, y in itertools.product(a, a)) / 2)


def received(a: Array, seen: Array) -> dict[int, float]:
    """Mean attention to each key, from 1, by the other queries that may see it; of keys that enough may see."""
    T, K = a.shape
    found = {}
    for key in range(K):
        others = [i for i in range(T) if seen[i, key] and not (T == K and i == key)]
        if len(others) >= min(8, max(1, T - 1)):
            found[key + 1] = float(np.mean([a[i, key] for i in others]))
    return found


def graph(seen: Array) -> dict[str, Any]:
    """Centers and radius by walking the graph from every node: from j to i where i may see j."""
    T = len(seen)
    far = {}
    for start in range(T):
        steps, left = {start: 0}, deque([start])
        while left:
            j = left.popleft()
            for i in np.flatnonzero(seen[:, j]):
                if i not in steps:
                    steps[i] = steps[j] + 1
                    left.append(i)
        if len(steps) == T:
            far[start] = max(steps.values())
    radius = min(far.values()) if far else None
    return {
        "tokens": T, "edges": seen.mean(), "centers": len(far), "radius": radius,
        "nearest": sum(steps == radius for steps in far.values()), "loops": bool(seen.diagonal().all()),
    }  # fmt: skip
