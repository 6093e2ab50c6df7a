"""Results made up for the tests of what is saved and shown: shaped like BERT-base, in no time."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from support.paths_by_hand import path_entry, path_tables

from rc_probe.result import ProbeResult

FLOOR = 1.9e-7
METRICS = (
    "residual", "residual_frobenius", "residual_absolute", "cosine", "cosine_centred", "norm",
    "effective_rank", "stable_rank",
)  # fmt: skip
ABLATIONS = ("attention.skip@all", "attention.skip@3-5", "mlp.skip", "mlp@7", "attention@1-2", "head@2:5")
# The residual at layer 0, and the factor from one layer to the next (SAN: the power).
Curves = dict[str, tuple[float, float]]
PRETRAINED: Curves = {
    "SAN": (0.84, 3.0), "SAN+MLP": (0.84, 0.78), "SAN+skip": (0.84, 0.95), "transformer": (0.84, 0.99),
}  # fmt: skip
INIT: Curves = {
    "SAN": (0.57, 3.0), "SAN+MLP": (0.57, 0.52), "SAN+skip": (0.57, 0.91), "transformer": (0.57, 0.973),
}  # fmt: skip
ABLATED = {"attention.skip@all": 0.78, "attention.skip@3-5": 0.88, "mlp.skip": 0.93, "mlp@7": 0.985,
           "attention@1-2": 0.992, "head@2:5": 0.9899}  # fmt: skip


def residual_at(layer: int, start: float, factor: float) -> float:
    """The residual that a made-up variant has; a factor above 1 is the power of pure attention."""
    if factor <= 1:
        return max(start * factor**layer * (1 + 0.03 * math.sin(2.3 * layer)), FLOOR)
    value = start
    for _ in range(layer):
        value = 0.12 * value**factor
    return max(value, FLOOR * (1 + 0.04 * math.sin(layer)))


def metric_at(metric: str, residual: float, layer: int) -> float:
    """Another metric of tokens that have this relative residual."""
    norm = 15.0 + 1.7 * layer
    return {
        "residual": residual,
        "residual_frobenius": residual * 0.93,
        "residual_absolute": residual * norm * 6.1,
        "cosine": 1 - 0.9 * residual**2,
        "cosine_centred": -0.004 - 0.01 * residual,
        "norm": norm,
        "effective_rank": 1 + 70 * residual**1.4,
        "stable_rank": 1 + 3.1 * residual,
        "residual_argmin": residual * 0.92,
    }[metric]


def residual_rows(
    weights: str, curves: Curves, blocks: int, metrics: Sequence[str], samples: int
) -> list[dict[str, Any]]:
    """The rows of the table `residuals` for one set of weights."""
    rows = []
    for variant, (start, factor) in curves.items():
        for layer in range(blocks + 1):
            residual = residual_at(layer, start, factor)
            for place, metric in enumerate(metrics):
                # real digits do not repeat: what they weigh in a report is tested
                jitter = 1 + 1e-3 * math.sin(97 * layer + 13 * len(variant) + 7 * place)
                mean = metric_at(metric, residual, layer) * jitter
                std = abs(mean) * 0.041 * jitter**3 / (1 + layer % 3) if samples > 1 else math.nan
                rows.append({
                    "weights": weights, "variant": variant, "layer": layer, "metric": metric, "mean": mean,
                    "std": std, "count": samples, "floor": 2.5 * FLOOR * (1 + 0.01 * layer) * jitter**2,
                })  # fmt: skip
    return rows


def ablation_rows(residuals: pd.DataFrame, blocks: int) -> list[dict[str, Any]]:
    """The rows of the table `ablations` that belong to pretrained `residuals`."""
    last = residuals[(residuals["weights"] == "pretrained") & (residuals["layer"] == blocks)]
    whole = last[last["variant"] == "transformer"].set_index("metric")["mean"]
    if whole.empty:
        return []
    rows = []
    for row in last[last["variant"] != "transformer"].itertuples():
        component, _, place = str(row.variant).partition("@")
        layer, _, head = place.partition(":")
        rows.append({
            "component": component, "layer": layer or "all", "head": head or None, "metric": row.metric,
            "value": row.mean, "baseline": whole[row.metric], "change": row.mean - whole[row.metric],
        })  # fmt: skip
    return rows


def recursion_frame(weights: Sequence[str]) -> pd.DataFrame:
    """The table `recursion`: the cubic law of pure attention, until it underflows."""
    rows = []
    for name in weights:
        value, previous = 0.561, math.nan
        for layer in range(6):
            rows.append({
                "weights": name, "layer": layer, "residual": value, "residual_direct": max(value, FLOOR),
                "ratio_cubed": value / previous**3 if previous > 1e-100 else math.nan,
            })  # fmt: skip
            previous, value = value, 0.106 * value**3
    return pd.DataFrame(rows)


def bounds_frame(weights: Sequence[str]) -> pd.DataFrame:
    """The table `bounds`, vacuous at the first two layers."""
    rows = []
    for name in weights:
        for layer in range(1, 6):
            vacuous = layer < 3
            rows.append({
                "weights": name, "layer": layer, "heads": 12, "d_qk": 64, "beta": 813.25 + layer,
                "gamma": 0.47, "coefficient": 2288.4 + layer, "spread": 4.1 if vacuous else 0.3 / layer,
                "residual_in": 10.0 ** (3 - 3**layer), "residual_out": 10.0 ** (3 - 3**layer) / 50,
                "bound_out": math.inf if layer == 1 else 10.0 ** (8 - 3**layer),
                "log10_bound_unrolled": 3.4 * layer, "vacuous": vacuous,
                "trivial_out": 10.0 ** (9 - 3**layer), "unrolled_vacuous": True, "unrolled_reason": "grows with depth",
                "reason": "scores spread by more than 1.256" if vacuous else None,
            })  # fmt: skip
    return pd.DataFrame(rows)


def structure_frame(blocks: int) -> pd.DataFrame:
    """The table `structure` of a post-LN encoder."""
    return pd.DataFrame([
        {"block": block, "name": f"encoder.layer.{block - 1}.{kind}", "call": 0, "junction": junction,
         "kind": kind, "norm_after": f"encoder.layer.{block - 1}.{kind}.output.LayerNorm", "parallel": False}
        for block in range(1, blocks + 1) for junction, kind in enumerate(("attention", "mlp"))
    ])  # fmt: skip


def make_result(
    *,
    blocks: int = 12,
    init: bool = True,
    ablations: Sequence[str] = (),
    metrics: Sequence[str] = METRICS,
    samples: int = 32,
    modality: str = "text",
    pretrained: Curves | None = None,
    deep: bool = True,
    paths: bool = True,
    **model: Any,
) -> ProbeResult:
    """A result with a probe's tables. `pretrained`: other curves; `deep`: with recursion and bounds; `paths`: with paths."""
    own = dict(PRETRAINED if pretrained is None else pretrained)
    own |= {name: (0.84, ABLATED[name]) for name in ablations}
    rows = residual_rows("pretrained", own, blocks, metrics, samples)
    rows += residual_rows("init", INIT, blocks, metrics, samples) if init else []
    residuals = pd.DataFrame(rows)
    weights = ["pretrained", "init"] if init else ["pretrained"]
    tables = {"residuals": residuals, "ablations": pd.DataFrame(ablation_rows(residuals, blocks))}
    if deep:
        tables |= {"recursion": recursion_frame(weights), "bounds": bounds_frame(weights)}
    tables["structure"] = structure_frame(blocks)
    tables |= path_tables(blocks, samples=samples) if paths else {}
    return ProbeResult(
        model={
            "id": "bert-base-cased", "class": "BertForMaskedLM", "model_type": "bert",
            "revision": "cd5ef92a9fb2", "parameters": 108_340_804, "blocks": blocks, "dim": 768, "heads": 12,
            "signature": "An|Mn", "norm": "post-LN", "attention": "sdpa",
            "proved": ["nothing edited: bitwise the plain output", "every branch off: a block is its norms"],
            "notes": ["From layer 6 on the residual is below the range of float64"],
            "paths": path_entry(samples) if paths else None,
            **model,
        },
        settings={
            "data": "32 bundled biographies" if modality == "text" else "16 bundled photographs",
            "modality": modality, "samples": samples, "length": 128, "batch_size": 8, "tokens": samples * 128,
            "truncated": 3, "dtype": "float32", "device": "cpu", "seed": 0, "init_seeds": 1,
            "special_tokens": True,
            "metrics": list(metrics), "ablate": list(ablations), "svd_samples": 4,
            "command": "rc-probe bert-base-cased --samples 32 --length 128 --seed 0"
            + "".join(f" --ablate {name}" for name in ablations),
        },
        environment={
            "rc_probe": "0.1.0", "torch": "2.9.1", "transformers": "5.0.0", "python": "3.11.9",
            "platform": "Linux x86_64", "date": "2026-01-02T03:04:05+00:00", "seconds": 41.7,
        },
        tables=tables,
    )  # fmt: skip


def with_bulk(result: ProbeResult, *, massive: bool) -> ProbeResult:
    """The same result with metrics of the bulk: those of all tokens, or apart by massive tokens in layers 3 to 5.

    Of the whole pretrained model: the residual of all tokens is .4 larger there, one token of 64 is massive,
    up to 160 times the median at layer 4.
    """
    rows = result.tables["residuals"]
    of_bulk = rows[rows["metric"].isin(["residual", "cosine", "effective_rank", "stable_rank"])].copy()
    of_bulk["metric"] += "_bulk"
    share = rows[rows["metric"] == "norm"].assign(metric="massive_share", mean=0.0, std=0.0)
    there = [(table["weights"] == "pretrained") & (table["variant"] == "transformer") & table["layer"].between(3, 5)
             for table in (rows, share)]  # fmt: skip
    if massive:
        rows.loc[there[0] & (rows["metric"] == "residual"), "mean"] += 0.4
        share.loc[there[1], "mean"] = 1 / 64
        result.tables["massive"] = pd.DataFrame([
            {"layer": layer, "position": position, "token": token, "samples": samples, "norm_over_median": times,
             "coordinate": 7, "coordinate_share": 0.9}
            for layer, position, token, samples, times in (
                (3, 1, "[CLS]", 32, 12.0), (4, 1, "[CLS]", 32, 160.0), (4, 9, " The", 1, 6.0), (5, 1, "[CLS]", 30, 8.0),
            )
        ])  # fmt: skip
        levels = rows[there[0] & (rows["metric"] == "residual")]
        result.tables["massive_levels"] = pd.DataFrame([
            {"massive": factor, "layer": row.layer, "mean": row.mean - 0.4, "floor": row.floor}
            for factor in (3, 5, 10) for row in levels.itertuples()
        ])  # fmt: skip
    result.tables["residuals"] = pd.concat([rows, of_bulk, share], ignore_index=True)
    return result
