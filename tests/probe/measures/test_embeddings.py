"""Embeddings of a run against each text by itself, through numpy: geometry, retrieval by layer, the best layer, who is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from scipy.stats import spearmanr
from support import tiny

import rc_probe
from rc_probe.budget import Shape
from rc_probe.hooks.errors import RcProbeError
from rc_probe.measures.embeddings import measured
from rc_probe.measures.embeddings.measured import affordable
from rc_probe.result import ProbeResult
from rc_probe.tasks.choose import halves

FAST: dict[str, Any] = {
    "init": False, "recursion": False, "paths": False, "metrics": ("residual",), "importance": "none",
}  # fmt: skip
TEXTS = [tiny.words(4 + 5 * i % 13, 1 + i % 9) for i in range(20)]


@pytest.fixture(scope="module")
def bert() -> Any:
    torch.manual_seed(0)
    return tiny.bert(initializer_range=0.5).eval()


@pytest.fixture(scope="module")
def found(bert: Any) -> ProbeResult:
    return rc_probe.probe(bert, TEXTS, processor=tiny.tokenizer(), batch_size=3, **FAST)


@torch.no_grad()
def by_layer(model: Any, texts: list[str]) -> list[Any]:
    """(layer) -> (texts, dim): the mean over the tokens of each text by itself; behind the final norm at the end."""
    rows = []
    for text in texts:
        output = model(**tiny.tokenizer()(text, return_tensors="pt"), output_hidden_states=True)
        rows.append([state[0].double().numpy().mean(0) for state in output.hidden_states])
    return [np.array([row[layer] for row in rows]) for layer in range(len(rows[0]))]


def unit(points: Any) -> Any:
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def values(result: ProbeResult, metric: str, column: str = "value") -> list[float]:
    table = result.tables["embeddings"]
    return [float(value) for value in table[table["metric"] == metric].sort_values("layer")[column]]


def test_every_layer_is_pooled_over_its_real_tokens(bert: Any, found: ProbeResult) -> None:
    pooled = by_layer(bert, TEXTS)
    assert len(set(TEXTS)) == len(TEXTS)
    cosines = [(unit(one) @ unit(one).T)[np.triu_indices(20, 1)] for one in pooled]
    np.testing.assert_allclose(values(found, "embedding_cosine"), [one.mean() for one in cosines], atol=1e-6)
    np.testing.assert_allclose(
        values(found, "embedding_cosine", "std"), [one.std(ddof=1) for one in cosines], atol=1e-6
    )
    for layer, one in enumerate(pooled):
        shares = np.linalg.svd(one - one.mean(0), compute_uv=False) ** 2
        shares /= shares.sum()
        used = (
            1 / np.square(shares).sum()
        )  # the participation ratio; the algorithm itself is in tests of metrics
        table = found.tables["embedding_components"].query(f"layer == {layer}")
        np.testing.assert_allclose(table["share"], shares[:10], atol=1e-6)
        assert values(found, "isoscore")[layer] == pytest.approx((used - 1) / 15, abs=1e-5)
        assert values(found, "first_component")[layer] == pytest.approx(shares[0], abs=1e-6)
    assert values(found, "isoscore", "most") == [1.0] * 3, "20 samples reach all of 16 dimensions"
    bins = found.tables["embedding_cosines"]
    assert bins["pairs"].sum() == 190
    assert all(
        row.pairs == ((cosines[-1] >= row.low) & (cosines[-1] < row.high)).sum() for row in bins.itertuples()
    )
    assert found.verdict["embeddings"]["cosine"] == values(found, "embedding_cosine")[-1]


def test_the_curves_passes_are_read_and_only_the_halves_are_run(
    bert: Any, found: ProbeResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many passes as without them, and one for each batch of halves; the numbers are those of passes of their own."""
    rows: list[int] = []

    def passes(**options: Any) -> tuple[list[int], ProbeResult]:
        rows.clear()
        handle = bert.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        result = rc_probe.probe(bert, TEXTS, processor=tiny.tokenizer(), batch_size=3, **FAST | options)
        handle.remove()
        return rows[:], result

    passes()  # which proves the structure
    with_them, without = passes()[0], passes(embeddings=False)[0]
    trials = len(with_them) - len(without) - 14  # on few samples, which say what the model is for
    assert sum(with_them) - sum(without) == 40 + 2 * trials
    monkeypatch.setattr(measured, "curve_reader", lambda context, plan: None)
    alone, result = passes()
    assert sum(alone) == sum(with_them) + 20
    for table in ("embeddings", "embedding_components", "embedding_cosines"):
        pd.testing.assert_frame_equal(found.tables[table], result.tables[table], rtol=1e-12)


def test_tokens_that_the_model_adds_are_in_no_embedding() -> None:
    """Longformer pads its own stream to whole windows, and takes that away again from what it returns."""
    torch.manual_seed(0)
    model = transformers.LongformerModel(transformers.LongformerConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        attention_window=[16, 16], max_position_embeddings=66, initializer_range=0.5,
    )).eval()  # fmt: skip
    found = rc_probe.probe(model, TEXTS[:6], processor=tiny.tokenizer(), batch_size=3, **FAST)
    pooled = []
    with torch.no_grad():
        for text in TEXTS[:6]:
            given = tiny.tokenizer()(text, return_tensors="pt")
            tokens = given["input_ids"].shape[1]
            states = model(**given, output_hidden_states=True)
            every = [*states.hidden_states[:-1], states.last_hidden_state]
            pooled.append([state[0, :tokens].double().numpy().mean(0) for state in every])
    for layer, one in enumerate(map(np.array, zip(*pooled, strict=True))):
        cosines = (unit(one) @ unit(one).T)[np.triu_indices(6, 1)]
        assert values(found, "embedding_cosine")[layer] == pytest.approx(cosines.mean(), abs=1e-6)


def test_halves_are_found_by_each_layer_and_the_best_is_chosen_on_others(
    bert: Any, found: ProbeResult
) -> None:
    cut = [halves(text) for text in TEXTS]
    ones, others = (by_layer(bert, [pair[i] for pair in cut]) for i in (0, 1))
    wanted = [pair[1] for pair in cut]
    hits = []
    for one, other in zip(ones, others, strict=True):
        nearest = (unit(one) @ unit(other).T).argmax(1)
        hits.append(np.array([wanted[i] == wanted[n] for n, i in enumerate(nearest)], dtype=float))
    np.testing.assert_allclose(values(found, "accuracy"), [one.mean() for one in hits])
    chosen = [one[::2].mean() for one in hits]
    layer = max(range(3), key=lambda n: (chosen[n], n))
    best = found.verdict["embeddings"]["best"]
    assert (best["layer"], best["chosen"], best["count"]) == (layer, chosen[layer], 10)
    assert (best["value"], best["own"]) == (hits[layer][1::2].mean(), hits[2][1::2].mean())


def test_any_batches_any_order(bert: Any, found: ProbeResult) -> None:
    other = rc_probe.probe(bert, TEXTS[::-1], processor=tiny.tokenizer(), batch_size=8, **FAST)
    mine, theirs = (
        each.tables["embeddings"].sort_values(["layer", "metric"])["value"].to_numpy()
        for each in (found, other)
    )
    np.testing.assert_allclose(theirs, mine, atol=2e-6)


def test_similarities_and_classes(bert: Any) -> None:
    others = [tiny.words(5 + i % 11, 2 + i % 7) for i in range(18)]
    alike = [float(i * 7 % 18) for i in range(18)]
    pairs = pd.DataFrame({"text": TEXTS[:18], "other": others, "score": alike})
    given = {"processor": tiny.tokenizer(), **FAST}
    ranked = rc_probe.probe(bert, pairs, label_column="other,score", **given)
    cosines = [
        (unit(one) * unit(other)).sum(1)
        for one, other in zip(by_layer(bert, TEXTS[:18]), by_layer(bert, others), strict=True)
    ]
    np.testing.assert_allclose(
        values(ranked, "spearman"), [spearmanr(one, alike).statistic for one in cosines]
    )
    best = ranked.verdict["embeddings"]["best"]
    assert best["chosen"] == pytest.approx(max(spearmanr(one[::2], alike[::2]).statistic for one in cosines))
    assert best["value"] == pytest.approx(spearmanr(cosines[best["layer"]][1::2], alike[1::2]).statistic)
    assert "--data DATA-GIVEN-IN-PYTHON" in ranked.settings["command"], "a frame has no truth value"
    labels = [i % 3 for i in range(20)]
    frame = pd.DataFrame({"text": TEXTS, "label": labels})
    classed = rc_probe.probe(bert, frame, label_column="label", **given)
    last = unit(by_layer(bert, TEXTS)[-1])
    near = last @ last.T
    np.fill_diagonal(near, -2)
    assert values(classed, "accuracy")[-1] == np.mean(
        [labels[i] == labels[n] for n, i in enumerate(near.argmax(1))]
    )


def test_the_last_layer_is_behind_the_final_norm_and_others_may_ask() -> None:
    """A Llama with grouped heads, which has a head of its own: only where it is asked for."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**tiny.SIZES, num_key_value_heads=1)
    model = transformers.LlamaForCausalLM(config).eval()
    texts, given = TEXTS[:4], {"processor": tiny.tokenizer(), **FAST}
    assert "embeddings" not in rc_probe.probe(model, texts, **given).tables
    asked = rc_probe.probe(model, texts, embeddings=True, **given)
    pooled = by_layer(model, texts)
    expected = [(unit(one) @ unit(one).T)[np.triu_indices(4, 1)].mean() for one in pooled]
    np.testing.assert_allclose(values(asked, "embedding_cosine"), expected, atol=1e-6)
    assert asked.verdict["embeddings"]["best"] is None, "four texts are too few to choose and to score"
    assert "rc-probe" in asked.settings["command"] and "--embeddings" in asked.settings["command"]


def test_off_and_one_sample(bert: Any) -> None:
    given = {"processor": tiny.tokenizer(), **FAST}
    assert "embeddings" not in rc_probe.probe(bert, TEXTS[:3], embeddings=False, **given).tables
    one = rc_probe.probe(bert, TEXTS[:1], embeddings=True, **given)
    assert "embeddings" not in one.tables
    assert "Embeddings were not measured: one sample has no pair." in one.model["notes"]
    same = rc_probe.probe(bert, TEXTS[:1] * 3, **given)
    assert set(same.tables["embeddings"]["metric"]) == {"rankme", "accuracy"}
    assert "Embeddings: all texts are the same, so that no pair has a cosine." in same.model["notes"]


def test_checks(bert: Any, found: ProbeResult, tmp_path: Path) -> None:
    cosine = values(found, "embedding_cosine")
    (outcome,) = found.fail_if("embedding_cosine@last>0.999")
    assert outcome.value == cosine[-1] and outcome.layer == 2
    with pytest.raises(AssertionError, match="isoscore"):
        found.fail_if("isoscore@min<0.9")
    for condition, says in (
        ("embedding_cosine@last>2", "never holds"),
        ("embedding_cosin@last>0.5", "Did you mean 'embedding_cosine'"),
    ):
        with pytest.raises(RcProbeError, match=says):
            found.fail_if(condition)
    without = replace(found, tables={name: t for name, t in found.tables.items() if name != "embeddings"})
    with pytest.raises(RcProbeError, match="the model’s own task is another"):
        without.fail_if("rankme@last<2")


def test_what_is_affordable_follows_from_shapes() -> None:
    """Of 2**17 texts of 384 numbers at 7 layers, and their halves: 1 GiB holds 3 × 7 × 384 × 4 bytes of 2**15."""
    shape = Shape(10_000_000, 6, 384, (12,), 128, 2**17)
    assert affordable(shape, paired=True) == 2**15
    assert affordable(replace(shape, samples=1000), paired=True) == 1000
