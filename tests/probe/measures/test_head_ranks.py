"""The ranks of heads: metrics against numbers by hand, rows of a run against the model, what is said and shown."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny, zoo
from support.head_weights import by_hand, dense
from support.made_results import make_result

import rc_probe
from rc_probe.cli.app import main
from rc_probe.metrics.spectra import centred_rank, rank_of, shape_of, spectrum

FAST: dict[str, Any] = {
    "init": False,
    "recursion": False,
    "paths": False,
    "metrics": ("residual",),
    "importance": "none",
}
TEXTS = [tiny.words(n, step) for n, step in ((9, 1), (14, 3), (5, 5))]


def test_spectra_by_hand() -> None:
    """σ = 3, 1: p = ¾, ¼, energies 9 and 1 of 10."""
    found = {name: value.item() for name, value in spectrum(torch.tensor([[3.0, 1.0, 0.0]]), 4, 8).items()}
    effective = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert found == pytest.approx({
        "effective_rank": effective, "stable_rank": 10 / 9, "r90": 1, "r99": 2, "share_of_head": effective / 4,
        "share_of_model": effective / 8,
    })  # fmt: skip
    assert rank_of(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 0.9).tolist() == [0, 2]


def test_shapes_by_hand() -> None:
    """−2 I on half of the axes is the most farthest-like form of its width; a rotation in the plane is skew."""
    a = torch.eye(4, dtype=torch.float64)[None, :2]
    half = shape_of(-2 * a @ a.mT, torch.tensor([2 * 2**0.5], dtype=torch.float64), 4)
    assert {name: value.item() for name, value in half.items()} == pytest.approx(
        {"symmetric": 1, "identity": -1}
    )
    turn = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]], dtype=torch.float64)
    turned = shape_of(turn, torch.tensor([2**0.5], dtype=torch.float64), 2)
    assert {name: value.item() for name, value in turned.items()} == pytest.approx(
        {"symmetric": 0, "identity": 0}
    )


def test_the_rank_of_centred_scores_is_that_of_numpy() -> None:
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(2, 3, 7, 4, generator=generator) for _ in range(2))
    key = key * 0.3 + torch.tensor([3.0, -2.0, 1.0, 4.0])  # what all keys share, the mean of a row takes off
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    found = centred_rank(query, key, mask)
    for sample, count in ((0, 7), (1, 5)):
        for head in range(3):
            scores = (query[sample, head, :count] @ key[sample, head, :count].T).double().numpy()
            energy = np.linalg.svd(scores - scores.mean(1, keepdims=True), compute_uv=False) ** 2
            wanted = 1 + int((np.cumsum(energy) < 0.9 * energy.sum()).sum())
            assert found[sample, head] == wanted


@pytest.fixture(scope="module")
def llama() -> tuple[Any, rc_probe.ProbeResult]:
    model, _ = zoo.build("llama")
    found = rc_probe.probe(
        model, TEXTS, processor=tiny.tokenizer(special=False), heads=True, batch_size=2, **FAST
    )
    return model, found


def test_rows_are_those_of_the_model(llama: tuple[Any, rc_probe.ProbeResult]) -> None:
    """Grouped and rotary heads, batches with padding. Scores: those of queries and keys as the library turns them."""
    model, result = llama
    table = result.tables["heads"].set_index(["block", "head", "circuit", "metric"])["value"]
    for block in (1, 3):
        qk, ov = dense(by_hand("llama", model, block - 1))
        for circuit, whole in (("qk", qk), ("ov", ov)):
            for head in range(4):
                s = np.linalg.svd(whole[head].numpy(), compute_uv=False)[:8]
                p = s / s.sum()
                assert table[block, head + 1, circuit, "effective_rank"] == pytest.approx(
                    np.exp(-(p * np.log(p)).sum()), rel=1e-5
                )
                square = whole[head, :, :32].numpy()[:32]
                assert table[block, head + 1, circuit, "symmetric"] == pytest.approx(
                    np.linalg.norm((square + square.T) / 2) ** 2 / np.linalg.norm(square) ** 2, rel=1e-5
                )
                cosine = np.trace(square) / np.linalg.norm(square) / np.sqrt(32)
                assert table[block, head + 1, circuit, "identity"] == pytest.approx(
                    cosine / np.sqrt(8 / 32), rel=1e-4
                )
    assert set(result.tables["heads"]["circuit"]) == {"qk", "ov"}
    pairs = result.tables["heads"].query("block == 1 and head != head")
    assert list(pairs["metric"]) == ["pair_1", "pair_2", "pair_3", "pair_4"] and pairs[
        "value"
    ].sum() == pytest.approx(1)
    # angles of one step 1, 0.1, 0.01, 0.001 over 14 tokens: all but the first turn less than once
    slow = [table[1, head, "qk", "slow_energy"] for head in range(1, 5)]
    assert np.mean(slow) == pytest.approx(pairs["value"].iloc[1:].sum())
    assert (table.xs("bottleneck", level="metric") == 1).all(), "8 features, 14 tokens"


def test_ranks_of_scores_on_data(llama: tuple[Any, rc_probe.ProbeResult]) -> None:
    model, result = llama
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    ranks: list[list[int]] = []
    for text in TEXTS:
        ids = tiny.tokenizer(special=False)(text, return_tensors="pt")["input_ids"]
        layer = model.layers[0]
        with torch.no_grad():
            x = layer.input_layernorm(model.embed_tokens(ids))
            query, key = (
                f(x).unflatten(-1, (-1, 8)).transpose(1, 2)
                for f in (layer.self_attn.q_proj, layer.self_attn.k_proj)
            )
            cos, sin = model.rotary_emb(x, torch.arange(ids.shape[1])[None])
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
        mine = []
        for head in range(4):
            scores = (query[0, head] @ key[0, head // 2].T).double().numpy()
            energy = np.linalg.svd(scores - scores.mean(1, keepdims=True), compute_uv=False) ** 2
            mine.append(1 + int((np.cumsum(energy) < 0.9 * energy.sum()).sum()))
        ranks.append(mine)
    found = result.tables["heads"].query("block == 1 and metric == 'logits_r90'")["value"].tolist()
    assert found == pytest.approx(np.mean(ranks, 0).tolist())


@pytest.mark.usefixtures("no_figures")
def test_what_is_said(llama: tuple[Any, rc_probe.ProbeResult]) -> None:
    result = llama[1]
    said = result.verdict["heads"]
    assert (
        "the queries and keys of 12 heads use" in said["sentence"] and "of 8 dimensions" in said["sentence"]
    )
    assert any("narrower than the longest sample (14 tokens)" in reason for reason in said["reasons"])
    assert any("turn with their positions" in note for note in result.model["notes"])
    text = result.to_html()
    assert "What rank do heads have?" in text and "at equal positions" in text and 'id="table-heads"' in text
    assert "What rank do heads have?" not in make_result(blocks=2).to_html()


def test_heat_maps_of_heads() -> None:
    from rc_probe.measures.heads.spectra import HEADS
    from rc_probe.reports.figures.heads.maps import head_maps, pair_figure

    rows = [
        {"block": block, "head": head, "circuit": "qk", "metric": "effective_rank", "value": float(block * head)}
        for block in (1, 2, 3) for head in (1, 2)
    ]  # fmt: skip
    figure = head_maps(HEADS.frame(rows), 8)
    assert figure is not None and len(figure.panels) == 1 and pair_figure(HEADS.frame(rows)) is None
    for text in ("head 2, block 3: 6.00", "head 1, block 1: 1.00", "Effective rank 1.0 to 6.0"):
        assert text in figure.panels[0]


def test_a_model_whose_heads_cannot_be_read_goes_on(tmp_path: Path) -> None:
    model, _ = zoo.build("qwen3")
    folder = tiny.saved(tmp_path / "m", model, tiny.tokenizer(special=False))
    (tmp_path / "t.txt").write_text("\n".join(TEXTS))
    words = [
        folder,
        "--data",
        str(tmp_path / "t.txt"),
        "--heads",
        "--no-init",
        "--no-recursion",
        "--no-paths",
        "--out",
        str(tmp_path / "o"),
    ]
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 0
    result = rc_probe.ProbeResult.load(tmp_path / "o" / "results.json")
    (note,) = (note for note in result.model["notes"] if "ranks of heads" in note)
    assert note == (
        "The ranks of heads were not measured: its queries go through a norm behind their projection: "
        "Qwen3RMSNorm (self_attn.q_norm)"
    )
    assert "heads" not in result.tables and "residuals" in result.tables
