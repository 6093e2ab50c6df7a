"""Truncation of heads: every number of one run against the model itself, what is said and shown, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import tiny, zoo
from support.head_weights import WIDTH, by_hand
from torch import Tensor

import rc_probe
from rc_probe import RcProbeError
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.attention_patterns import patterns
from rc_probe.hooks.heads.rank import rank_matrices
from rc_probe.hooks.heads.read import heads_of

FAST: dict[str, Any] = {"init": False, "recursion": False, "paths": False, "metrics": ("residual_bulk",), "importance": "none",
                        "attention": False}  # fmt: skip
SCORED = [tiny.words(n, step) for n, step in ((9, 1), (14, 3), (5, 5), (11, 7))]
OTHERS = [tiny.words(n, step) for n, step in ((8, 2), (10, 9), (13, 4), (6, 11))]
TOLERANCE = 2e-4  # that some heads pass with a rank of 2 and some do not
SAN = "attention.skip@all+mlp.sublayer@all"


def probed(model: Any, **more: Any) -> rc_probe.ProbeResult:
    asked = {
        "truncation": "2",
        "truncation_ranks": (2, 5),
        "truncation_samples": 4,
        "batch_size": 2,
        **FAST,
        **more,
    }
    return rc_probe.probe(model, [*SCORED, *OTHERS], processor=tiny.tokenizer(special=False), **asked)


@pytest.fixture(scope="module")
def run() -> tuple[Any, rc_probe.ProbeResult]:
    model, _ = zoo.build("gpt2_lm")
    return model, probed(model, ablate=[f"{SAN}+rank@all=2"], head_tolerance=TOLERANCE)


def encoded(texts: list[str]) -> list[dict[str, Tensor]]:
    return [
        {"input_ids": tiny.tokenizer(special=False)(text, return_tensors="pt")["input_ids"]} for text in texts
    ]


def rows(result: rc_probe.ProbeResult, **place: Any) -> pd.DataFrame:
    table = result.tables["truncation"]
    for name, value in place.items():
        table = table[table[name].isna() if value is None else table[name] == value]
    return table


def loss(model: Any, spec: str | None) -> float:
    """Mean over all predicted tokens, of texts one by one."""
    total, count = 0.0, 0
    for inputs in encoded(SCORED):
        with torch.no_grad():
            if spec is None:
                logits = model(**inputs).logits
            else:
                with rc_probe.ablate(model, spec, inputs=inputs, readings=encoded(OTHERS)):
                    logits = model(**inputs).logits
        logs = logits[0, :-1].double().log_softmax(-1)
        total -= float(logs.gather(1, inputs["input_ids"][0, 1:, None]).sum())
        count += len(logs)
    return total / count


@pytest.mark.parametrize(
    ("spec", "place"),
    [
        ("rank@all=2", {"block": None, "rank": 2, "method": "weights"}),
        ("rank@2=5:data", {"block": 2, "head": None, "rank": 5, "method": "data"}),
        ("rank@2:3=2:data", {"block": 2, "head": 3, "rank": 2, "method": "data"}),
    ],
)
def test_losses(run: tuple[Any, rc_probe.ProbeResult], spec: str, place: dict[str, Any]) -> None:
    """Subspaces by the data were chosen on the other samples."""
    row = rows(run[1], metric="loss", **place).iloc[0]
    assert row["value"] == pytest.approx(loss(run[0], spec), rel=1e-5)
    assert row["baseline"] == pytest.approx(loss(run[0], None), rel=1e-6)
    assert row["change"] == pytest.approx(row["value"] - row["baseline"], abs=1e-12)


def test_rows_of_attention(run: tuple[Any, rc_probe.ProbeResult]) -> None:
    """Σ p ln(p / q) over keys, the mean over heads and the queries of all texts."""
    model, result = run
    structure = find_structure(model, zoo.inputs_for("gpt2_lm", model))
    found: dict[str, list[np.ndarray]] = {}
    for spec in ("rank@2=8", "rank@2=2"):
        for inputs in encoded(SCORED):
            keep = lambda block, branch, p, spec=spec: (  # noqa: E731
                found.setdefault(spec, []).append(p[0].double().numpy()) if block.index == 1 else None
            )
            with torch.no_grad(), rc_probe.ablate(model, spec, inputs=inputs), patterns(structure, keep):
                model(**inputs)
    each: list[np.ndarray] = []
    for p, q in zip(found["rank@2=8"], found["rank@2=2"], strict=True):
        terms = np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(q > 0, q, 1)), 0).sum(-1)
        each.append(terms)  # (heads, queries)
    flat = np.concatenate([terms.ravel() for terms in each])
    value = rows(result, block=2, head=None, rank=2, method="weights", metric="attention_kl")["value"].item()
    assert value == pytest.approx(flat.mean(), rel=1e-3) and value > 0.01


def test_tokens_found(run: tuple[Any, rc_probe.ProbeResult]) -> None:
    """By hand: q = Az, k = Bz of the trunk's block 2, qᵀPk without the token itself; the nearest by the cosine of z."""
    model, result = run
    trunk = model.transformer
    maps = by_hand("gpt2", trunk, 1)
    structure = find_structure(model, zoo.inputs_for("gpt2_lm", model))
    p = rank_matrices(structure, heads_of(structure, (2,))[0], 2, "weights")
    same, near, own, count = np.zeros(4), np.zeros(4), np.zeros(4), 0
    for inputs in encoded(SCORED):
        with torch.no_grad():
            x = trunk(**inputs, output_hidden_states=True).hidden_states[1][0]
            plain = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            z = (plain * trunk.h[1].ln_1.weight + trunk.h[1].ln_1.bias).double()
        one = torch.cat([plain.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
        unit = z / z.norm(dim=1, keepdim=True)
        nearest = (unit @ unit.T).fill_diagonal_(-np.inf).argmax(1)
        for head in range(4):
            q, k = one @ maps["query"][head].T, one @ maps["key"][head].T
            whole = (q @ k.T).fill_diagonal_(-np.inf).argmax(1)
            low = (q @ p[head] @ k.T).fill_diagonal_(-np.inf).argmax(1)
            same[head] += float((low == whole).sum())
            near[head] += float((low == nearest).sum())
            own[head] += float((whole == nearest).sum())
        count += len(x)
    for metric, hits, base in (("retrieval", same, np.full(4, count)), ("nearest", near, own)):
        found = rows(result, block=2, rank=2, method="weights", metric=metric)
        assert found["value"].tolist() == pytest.approx((hits / count).tolist())
        assert found["baseline"].tolist() == pytest.approx((base / count).tolist())


def test_the_smallest_ranks_and_the_model_that_has_them(run: tuple[Any, rc_probe.ProbeResult]) -> None:
    model, result = run
    smallest = rows(result, metric="smallest_rank").set_index("head")["value"]
    for head in range(1, 5):
        cost = rows(result, block=2, head=head, metric="loss").set_index("rank")["change"]
        small = 8 if cost[5] > TOLERANCE else 5 if cost[2] > TOLERANCE else 2
        assert smallest[head] == small
    parameters = rows(result, method="smallest", metric="parameters").iloc[0]
    assert parameters["baseline"] == 32 * 32 * 2 and parameters["value"] == sum(2 * 32 * r for r in smallest)
    parts = [f"rank@2:{int(head)}={int(r)}:data" for head, r in smallest.items() if r < WIDTH]
    joint = rows(result, method="smallest", metric="loss")
    assert len(joint) == bool(parts)
    if parts:
        assert joint["value"].item() == pytest.approx(loss(model, "+".join(parts)), rel=1e-5)


def test_collapse_by_rank(run: tuple[Any, rc_probe.ProbeResult]) -> None:
    """Of the scored samples; the SAN as the run's own curves have it, on a run of these samples alone."""
    model, result = run
    curves = result.tables["truncation_curves"]
    alone = rc_probe.probe(
        model,
        SCORED,
        processor=tiny.tokenizer(special=False),
        ablate=[f"{SAN}+rank@all=2", "rank@all=5"],
        batch_size=2,
        **FAST,
    ).residuals.query("metric == 'residual_bulk'")
    for network, rank, variant, plain in (
        ("SAN", 2, f"{SAN}+rank@all=2", "SAN"), ("transformer", 5, "rank@all=5", "transformer"),
    ):  # fmt: skip
        mine = curves[
            (curves["network"] == network) & (curves["rank"] == rank) & (curves["method"] == "weights")
            & (curves["metric"] == "residual_bulk")
        ]  # fmt: skip
        assert mine["layer"].tolist() == [0, 1, 2, 3]
        for name, column in ((variant, "value"), (plain, "baseline")):
            wanted = alone[alone["variant"] == name]["mean"].tolist()
            assert mine[column].tolist() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.usefixtures("no_figures")
def test_what_is_said(run: tuple[Any, rc_probe.ProbeResult]) -> None:
    result = run[1]
    said = result.verdict["truncation"]
    change = rows(result, block=None, rank=2, method="weights", metric="loss")["change"].item()
    assert said["rank"] == 2 and said["sentence"].startswith(
        "With rank 2 of 8 in every head the loss changes by "
    )
    assert f"{change:+.2g}".replace("-", "−").lstrip("+")[:4] in said["sentence"]
    assert any("by the data, of 4:" in reason for reason in said["reasons"])
    assert any("4 heads of width 8 in a stream of 32" in reason for reason in said["reasons"])
    text = result.to_html()
    assert "What heads of less rank cost" in text and 'id="table-truncation"' in text


def test_figures(run: tuple[Any, rc_probe.ProbeResult]) -> None:
    from rc_probe.reports.figures.heads.truncation import collapse_figure, rank_figure, smallest_figure

    result = run[1]
    cost = rank_figure(result.tables["truncation"], "loss", WIDTH)
    assert cost is not None and len(cost.panels) == 3 and "by the data, rank 8: 0 nats" in cost.panels[0]
    collapse = collapse_figure(result.tables["truncation_curves"])
    assert (
        collapse is not None and "rank 2, layer 3" in collapse.panels[0] and "full rank" in collapse.panels[1]
    )
    small = smallest_figure(result.tables["truncation"], WIDTH)
    assert small is not None and "head 4, block 2" in small.panels[0]


@pytest.mark.parametrize(
    ("blocks", "shown"),
    [
        ((2,), "2"),
        ((1, 6), "1 6"),
        (tuple(range(1, 30, 2)), "1 7 13 19 25"),
        ((1, 2, 3), "1 2 3"),
        (tuple(range(1, 13)), "2 4 6 8 10 12"),
    ],
)
def test_columns_of_a_map_have_the_numbers_of_their_blocks(blocks: tuple[int, ...], shown: str) -> None:
    from rc_probe.reports.figures.heads.truncation import smallest_figure

    rows = [
        {"block": block, "head": head, "metric": "smallest_rank", "value": 1.0}
        for block in blocks
        for head in (1, 2)
    ]
    figure = smallest_figure(pd.DataFrame(rows), WIDTH)
    assert figure is not None
    found = re.findall(r'text-anchor="middle" fill="var\(--muted[^>]*>(\d+)</text>', figure.panels[0])
    assert " ".join(found) == shown


def test_batches_change_nothing(run: tuple[Any, rc_probe.ProbeResult]) -> None:
    other = probed(run[0], batch_size=4, head_tolerance=TOLERANCE).tables["truncation"]
    assert other["value"].to_numpy() == pytest.approx(
        run[1].tables["truncation"]["value"].to_numpy(), rel=1e-4, abs=1e-6
    )


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"truncation": "9"}, "there is no block 9"),
        ({"truncation": "x"}, "'x' is not a number or a range"),
        ({"truncation_ranks": (9,)}, "heads are 8 wide, and none has rank 9"),
        ({"head_tolerance": -1.0}, "is no cost"),
        ({"truncation": None}, "it changes nothing: truncation of heads is not measured"),
    ],
)
def test_bad_options_end_before_anything_is_measured(
    run: tuple[Any, Any], more: dict[str, Any], what: str
) -> None:
    seen: list[str] = []
    with pytest.raises(RcProbeError) as error:
        probed(run[0], progress=lambda stage, done, total: seen.append(stage), **more)
    assert what in str(error.value) and not [stage for stage in seen if "pretrained" in stage]
