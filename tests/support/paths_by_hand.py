"""Tables of paths made up for the tests of what is shown: a BERT-base that fills in masked tokens."""

import math
from typing import Any

import pandas as pd

from rc_probe.paths.path_counts import architecture_rows, count_rows, path_counts

Row = dict[str, Any]
BEST = 0.62  # accuracy of the whole model


def row(
    length: int | None, estimator: str, scope: str, metric: str, mean: float, half: float, **rest: Any
) -> Row:
    """A row as the engine makes it: `half` is half of the 95 % interval, 0 for one value."""
    known = half > 0
    return {
        "length": length, "count": None, "estimator": estimator, "drawn": None, "scope": scope, "metric": metric,
        "mean": mean, "std": half * 2 if known else math.nan, "low": mean - half if known else math.nan,
        "high": mean + half if known else math.nan, **rest,
    }  # fmt: skip


def agreement_at(scope: str, k: int, longest: int) -> float:
    """What a made-up model says like the whole one: nearly all of it with paths of length 0 to 2."""
    if scope == "up_to":
        return 1.0 if k == longest else min(0.999, (0.55, 0.86, 0.978)[k] if k < 3 else 0.978 + 0.002 * k)
    if scope == "alone":
        return 0.08 + 0.53 * math.exp(-((k - 1) ** 2) / 1.7)
    return 1 - 0.5 * math.exp(-k / 1.3)


def path_rows(
    blocks: int = 12, heads: int = 12, samples: int = 32, draws: tuple[int, ...] = (5, 20)
) -> list[Row]:
    """The rows of the table `paths` with all three estimators."""
    rows = []
    half = 0.021 if samples > 1 else 0.0
    for k, count in enumerate(path_counts([heads] * blocks)):
        own = {"count": str(count)}
        share = 0.71 * 0.38 * 0.62**k * (1 + 0.2 * math.sin(k))
        for metric, value in (("norm_share", share), ("projection", 1.2 * share), ("cosine_to_output", 0.8 * 0.7**k),
                              ("residual", 0.8 * 0.72**k)):  # fmt: skip
            rows.append(row(k, "exact", "alone", metric, value, half / 4, **own))
        for scope in ("alone", "up_to", "all_but"):
            agreement = agreement_at(scope, k, blocks)
            for metric, value in (("agreement", agreement), ("accuracy", BEST * agreement),
                                  ("loss", 1.9 + 4 * (1 - agreement))):  # fmt: skip
                rows.append(row(k, "exact", scope, metric, value, half, **own))
                for n in draws:
                    noisy = value * (1 - 0.5 / n) + 0.03 * math.sin(7 * k + n)
                    rows.append(row(k, "sampled", scope, metric, noisy, 0.25 / math.sqrt(n), drawn=n, **own))
        for n in draws:
            live = 0.05 + 0.5 * math.exp(-((k - 1.2) ** 2) / 3) * (1 - 0.4 / n)
            for metric, value in (("agreement", live), ("accuracy", BEST * live), ("loss", 6 - 4 * live)):
                rows.append(row(k, "live", "alone", metric, value, 0.15 / math.sqrt(n), drawn=n, **own))
    for metric, values in {
        "agreement": (0.121, 0.094, 1.0),
        "accuracy": (0.07, 0.061, BEST),
        "loss": (7.3, 6.4, 1.9),
    }.items():
        rows.append(row(None, "exact", "none", metric, values[0], half))
        rows.append(row(None, "baseline", "baseline", metric, values[1], 0.0))
        rows.append(row(None, "full", "full", metric, values[2], half))
    return rows


def chain_rows(blocks: int) -> list[Row]:
    """The rows of the table `chains`: each pattern takes the product nearer to rank one."""
    rows = []
    for metric, start, factor in (("rank_one", 0.4, 0.47), ("mean_row", 0.95, 0.49), ("dobrushin", 1.0, 0.6)):
        for k in range(1, blocks + 1):
            median = start * factor ** (k - 1)
            rows.append({"length": k, "metric": metric, "mean": 1.2 * median, "std": 0.4 * median, "median": median,
                         "low": 0.6 * median, "high": 1.7 * median, "count": 100})  # fmt: skip
    return rows


def path_tables(
    blocks: int = 12, heads: int = 12, samples: int = 32, name: str = "bert-base-cased"
) -> dict[str, pd.DataFrame]:
    """The tables of paths of one model."""
    sources = [
        row(None, "", "", metric, value, 0.01) | {"source": source}
        for source, value in (("tokens", 0.58), ("positions", 0.11), ("bias", 0.31))
        for metric in ("norm_share", "projection")
    ]
    columns = ["source", "metric", "mean", "std", "low", "high"]
    return {
        "paths": pd.DataFrame(path_rows(blocks, heads, samples)),
        "path_sources": pd.DataFrame(sources)[columns],
        "path_counts": pd.DataFrame([*count_rows(name, [heads] * blocks), *architecture_rows()]),
        "chains": pd.DataFrame(chain_rows(blocks)),
    }


def path_entry(samples: int = 32, task: str | None = "masked token") -> dict[str, Any]:
    """The entry `paths` of the model."""
    return {"task": task, "samples": samples, "euler_error": 3.1e-7, "repeats": 5,
            "notes": ["All lengths were measured on made-up texts"]}  # fmt: skip
