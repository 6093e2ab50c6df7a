"""The model's own attention against the library's eager attention and loops by hand; runs, checks and comparisons of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import patterns_by_hand as by_hand
from support import tiny, zoo
from support.attention import attached
from support.structures import with_branch
from torch import Tensor

import rc_probe
from rc_probe import RcProbeError
from rc_probe.budget import Shape
from rc_probe.cli.app import main
from rc_probe.comparison import compare
from rc_probe.data.batches import Batch
from rc_probe.hooks.attach import find_structure
from rc_probe.measures.attention.affordable import Chosen, affordable, said
from rc_probe.measures.attention.first_patterns import FirstPatterns
from rc_probe.measures.attention.reading import Reading
from rc_probe.measures.chained_attention import chained_products
from rc_probe.registry import ATTENTION_METRICS

FAST: dict[str, Any] = {"init": False, "recursion": False, "paths": False, "metrics": "residual"}
Array = np.ndarray


def eager(model: Any, inputs: Any, name: str = "attentions") -> list[Tensor]:
    other = type(model)._from_config(
        copy.deepcopy(model.config), attn_implementation="eager", dtype=model.dtype
    )
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        return [a.double() for a in other.eval()(**inputs, output_attentions=True)[name]]


def made(inputs: Any) -> Batch:
    mask = inputs.get("attention_mask")
    return Batch(inputs, None if mask is None or bool(mask.all()) else mask.bool())


def read(structure: Any, batch: Batch, samples: int = 4, **how: Any) -> Reading:
    found = Reading(**how)
    for sample in FirstPatterns(structure, [batch]).samples(samples):
        found.add(sample)
    return found


def real_of(inputs: Any, sample: int, tokens: int) -> Array:
    mask = inputs.get("attention_mask")
    return np.arange(tokens) if mask is None else np.flatnonzero(mask[sample].numpy())


CASES = [
    ("bert", True), ("gpt2", True), ("llama", True), ("mistral", False), ("falcon", True), ("bloom", False), ("vit", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "padded"), CASES)
def test_rows_are_those_of_eager_attention(name: str, padded: bool) -> None:
    """Grouped heads, sliding windows, interceptions; padding is nobody's."""
    model, inputs, structure = attached(name, padded=padded, dtype=torch.float64)
    wanted: dict[tuple[int, int, str], list[float]] = {}
    chains: list[list[tuple[float, float]]] = []
    attentions = eager(model, inputs)
    for sample in range(2):
        real = real_of(inputs, sample, attentions[0].shape[-1])
        product, paths, kept = np.eye(len(real)), 1.0, []
        for block, attention in enumerate(attentions, start=1):
            heads = [a.numpy()[real][:, real] for a in attention[sample]]
            found = [by_hand.head(a, heads[0] > 0) for a in heads]
            for head, values in enumerate(found, start=1):
                for metric, value in values.items():
                    wanted.setdefault((block, head, metric), []).append(value)
            product = np.mean(heads, axis=0) @ product
            paths *= max(values["dobrushin"] for values in found)
            kept.append((by_hand.dobrushin(product), paths))
        chains.append(kept)
    reading = read(structure, made(inputs))
    rows = reading.head_rows()
    found_rows = {(r["block"], r["head"], r["metric"]): r for r in rows if r["head"]}
    assert found_rows.keys() == wanted.keys() and {r["component"] for r in rows} == {"attention"}
    for key, values in wanted.items():
        assert found_rows[key]["mean"] == pytest.approx(np.mean(values), rel=1e-6, abs=1e-9), key
        assert found_rows[key]["count"] == len(values) == 2
        assert found_rows[key]["std"] == pytest.approx(np.std(values, ddof=1), rel=1e-4, abs=1e-6)
    for row in (r for r in rows if r["head"] is None):
        of_heads = [
            np.mean(v) for (block, _, m), v in wanted.items() if (block, m) == (row["block"], row["metric"])
        ]
        assert row["mean"] == pytest.approx(np.mean(of_heads), rel=1e-6, abs=1e-9)
    masks = reading.mask_rows()
    assert [row["block"] for row in masks] == list(range(1, structure.depth + 1))
    for row in masks:
        kept_here = np.mean([kept[row["block"] - 1] for kept in chains], axis=0)
        assert (row["product"], row["paths"]) == pytest.approx(tuple(kept_here), rel=1e-6)
        assert row["product"] <= row["bound"] <= 1 and row["self_loops"]
    longest = max((real_of(inputs, s, attentions[0].shape[-1]) for s in range(2)), key=len)
    graph = by_hand.graph(attentions[0][0].mean(0).numpy()[: len(longest), : len(longest)] > 0)
    assert {k: masks[0][k] for k in ("tokens", "edges", "centers", "radius")} == {
        k: pytest.approx(graph[k]) for k in ("tokens", "edges", "centers", "radius")
    }
    assert (graph["centers"] == 1) == (name not in ("bert", "vit"))
    assert name != "mistral" or graph["radius"] > 1
    assert reading.notes() == []


def test_sinks_are_named() -> None:
    """A model whose heads of block 2 look at the second real token, wherever padding is."""
    model, inputs, structure = attached("bert", padded=True, dtype=torch.float64)
    attentions = eager(model, inputs)
    reading = read(structure, made(inputs))
    wanted: dict[tuple[int, int, int, int], list[float]] = {}
    for sample in range(2):
        real = real_of(inputs, sample, 12)
        for block, attention in enumerate(attentions, start=1):
            for head, a in enumerate(attention[sample].numpy(), start=1):
                own = a[real][:, real]
                for key, value in by_hand.received(own, own > -1).items():
                    token = int(inputs["input_ids"][sample, real[key - 1]])
                    if value > 0.3:
                        wanted.setdefault((block, head, key, token), []).append(value)
    rows = reading.sink_rows(lambda token: f"t{token}")
    found = {(r["block"], r["head"], r["position"], int(r["token"][1:])): r for r in rows}
    assert found.keys() == wanted.keys() and wanted
    for key, values in wanted.items():
        assert (found[key]["samples"], found[key]["attention"]) == (
            len(values),
            pytest.approx(np.mean(values)),
        )


def test_windows_and_cross_attention() -> None:
    """Heads of windows are read, one image at a time; they have no graph. Queries and keys of two streams neither."""
    _, inputs, structure = attached("swin")
    reading = read(structure, Batch(inputs, None))
    assert {row["count"] for row in reading.head_rows()} == {2}
    assert reading.mask_rows() == []
    assert reading.notes() == ["No product of attention patterns: patterns of windows have no product."]
    assert all(row["mean"] > 0 for row in reading.head_rows() if row["metric"] == "least_weight")
    sizes = {
        "vocab_size": 100,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 32,
        "num_layers": 1,
        "num_decoder_layers": 2,
    }
    torch.manual_seed(0)
    model = transformers.T5Model(transformers.T5Config(**sizes, num_heads=2)).eval().double()
    ids, mask = torch.randint(5, 100, (2, 9)), torch.ones(2, 7).long()
    mask[1, 4:] = 0
    inputs = {"input_ids": ids[:, :7], "attention_mask": mask, "decoder_input_ids": ids}
    structure = find_structure(model, inputs, stack="decoder.block")
    reading = read(structure, Batch(inputs, None))
    crossed = eager(model, inputs, "cross_attentions")
    for row in reading.head_rows():
        if (
            row["component"] == "cross"
            and row["head"]
            and row["metric"] in ("entropy", "dobrushin", "least_weight")
        ):
            heads = [
                a[row["head"] - 1].numpy()[:, : int(m.sum())]
                for a, m in zip(crossed[row["block"] - 1], mask, strict=True)
            ]
            values = [by_hand.head(a, a > -1)[row["metric"]] for a in heads]
            assert row["mean"] == pytest.approx(np.mean(values), rel=1e-6)
    assert {row["component"] for row in reading.head_rows()} == {"attention", "cross"}
    assert [row["block"] for row in reading.mask_rows()] == [1, 2] and reading.notes() == []


def test_patterns_that_cannot_be_read_or_multiplied() -> None:
    _, inputs, structure = attached("bert")
    with pytest.raises(RcProbeError, match="cannot be seen"):
        read(with_branch(structure, 1, 0, ops=()), made(inputs))
    model, inputs, structure = attached("bert", dtype=torch.float64)
    samples = list(FirstPatterns(structure, [made(inputs)]).samples(1))
    reading = Reading()
    halved = [copy.copy(p) for p in samples[0].patterns]
    object.__setattr__(halved[1], "weights", halved[1].weights / 2)  # as a learned sink leaves them
    object.__setattr__(samples[0], "patterns", halved)
    reading.add(samples[0])
    assert reading.notes() == ["No product of attention patterns: rows of its patterns do not sum to one."]
    assert [row["product"] for row in reading.mask_rows()] == [None] * 3
    rows = {(r["block"], r["head"], r["metric"]): r["mean"] for r in reading.head_rows()}
    own = eager(model, inputs)[1][0, 0].numpy() / 2
    assert rows[2, 1, "entropy"] == pytest.approx(by_hand.head(own, own > -1)["entropy"])


def test_patterns_are_read_once_for_all() -> None:
    _, inputs, structure = attached("bert", batch=3, padded=True)
    calls: list[int] = []
    patterns = FirstPatterns(structure, [made(inputs)])
    with structure.module(structure.blocks[0]).register_forward_pre_hook(
        lambda m, args: calls.append(len(args[0]))
    ):
        first = [sample.number for sample in patterns.samples(4)]
        assert chained_products(structure, [], read=patterns)
        assert (first, [s.number for s in patterns.samples(2)], calls) == ([0, 1, 2], [0, 1], [3])
    one = read(structure, made(inputs), 1)
    assert {row["count"] for row in one.head_rows()} == {1}


def test_what_is_affordable() -> None:
    base = Shape(85_054_464, 12, 768, (12,) * 12, 128, 32)
    assert affordable(base, 144, cut=True) == Chosen() and said(Chosen()) == []
    long = Shape(85_054_464, 12, 768, (12,) * 12, 4096, 8)
    chosen = affordable(long, 144, cut=True)
    assert chosen is not None and chosen.tokens and chosen.tokens < 4096
    cost = chosen.samples * (
        1.5 * long.plain(chosen.tokens) + 144 * (1500 + 20 * chosen.tokens) * chosen.tokens**2
    )
    assert cost <= 0.3 * 8 * long.plain()
    assert said(chosen)[0].startswith(f"The model's own attention: {chosen.samples} sample")
    assert affordable(Shape(10**6, 4, 64, (4,) * 4, 10**5, 1), 16, cut=False) is None


# ---- whole runs


@pytest.fixture(scope="module")
def sunk() -> Any:
    """GPT-2 in whose block 2 every query finds token 1: its key is what the bias of all queries points to."""
    model, _ = zoo.build("gpt2")
    with torch.no_grad():
        attn = model.h[1].attn
        attn.c_attn.weight[:, :64] = 0
        attn.c_attn.bias[:64] = 0
        model.wpe.weight[:] *= 0.1
        model.wpe.weight[0, 0] = 50
        attn.c_attn.weight[0, 32:64] = 1
        attn.c_attn.bias[:32] = 3
        model.h[1].ln_1.weight[:] = 1
    return model


@pytest.fixture(scope="module")
def result(sunk: Any) -> rc_probe.ProbeResult:
    texts = [tiny.words(12, step) for step in (1, 3, 5)]
    return rc_probe.probe(sunk, texts, processor=tiny.tokenizer(special=False), **FAST)


def test_a_run_says_which_heads_have_a_sink(result: rc_probe.ProbeResult) -> None:
    found = result.verdict["attention"]
    sinks = result.tables["attention_sinks"].query("block == 2")
    assert (
        set(sinks["position"]) == {1} and set(sinks["head"]) == {1, 2, 3, 4} and set(sinks["token"]) == {"w0"}
    )
    assert "position 1 (“w0”) in " in found["sentence"] and " of 12 heads give over 0.3" in found["sentence"]
    assert found["heads"] == 12 and found["heads_with_sink"] >= 4
    share = (
        result.tables["attention"]
        .query("metric == 'sink_share' and block == 2 and head.isna()")["mean"]
        .item()
    )
    assert share == 1
    reasons = " ".join(found["reasons"])
    for words in ("no defect", "Multiplied over all 3 blocks", "1 center, radius 1", "over β_c"):
        assert words in reasons, words
    assert set(result.tables["attention"]["metric"]) == set(ATTENTION_METRICS)
    off = rc_probe.probe(
        zoo.build("gpt2")[0],
        [tiny.words(5)],
        processor=tiny.tokenizer(special=False),
        attention=False,
        **FAST,
    )
    assert not {"attention", "attention_sinks", "attention_masks"} & set(off.tables)


def test_checks(result: rc_probe.ProbeResult) -> None:
    from rc_probe.results.checks import Checks

    frame = result.tables["attention"]
    frame = frame[frame["metric"] == "entropy"]
    for text, passed in (
        ("sink_share@2>=1", False), ("sink_share@min:2>=1", True), ("sink@2:least<0.3", True), ("entropy@max>0.9999", True),
    ):  # fmt: skip
        assert Checks.of([text]).evaluate(result)[0].passed is passed, text
    wanted = frame[frame["head"].notna()].groupby("block")["mean"].min().max()
    assert Checks.of(["entropy@max:least<0.5"]).evaluate(result)[0].value == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("sink_share@max>1", [], "never holds"), ("sinkshare@max>.5", [], "Did you mean 'sink_share'"),
        ("phase@max:all>2", [], "phase of 'all' is not measured"),
        ("entropy@min<.1", ["--no-attention"], "Leave --no-attention out"),
    ],
)  # fmt: skip
def test_bad_checks_are_one_line(
    text: str, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ends:
        main(["demo", "--fail-if", text, *options])
    assert ends.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0]


def test_comparisons_and_pages(result: rc_probe.ProbeResult, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result.save(folder)
    again = rc_probe.ProbeResult.load(folder)
    assert again.verdict["attention"] == result.verdict["attention"]
    both = compare(result, again)
    assert set(both.tables["attention"]["run"]) == {run.name for run in both.runs}
    page = both.to_html()
    assert "The models’ own attention" in page and "over β_c" in page
    own = result.to_html()
    own = own[own.index("The model’s own attention") :].partition("</section>")[0]
    for words in (
        'id="figure-attention-heads"', 'id="figure-attention-products"', "Mean attention to one key", "block 2, head 4:",
        'id="table-attention"', 'id="table-attention-sinks"', 'id="table-attention_masks"', "product of all patterns to here",
        result.verdict["attention"]["sentence"],
    ):  # fmt: skip
        assert words in own, words
    entries = json.loads((folder / "results.json").read_text())
    assert entries["model"]["attention"] == {"samples": 3}
