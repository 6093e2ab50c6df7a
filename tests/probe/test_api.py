"""The whole measurement: the same numbers however it is cut, and the paper's figure."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import tiny, zoo

import rc_probe
from rc_probe import RcProbeError, api
from rc_probe.cli.app import main
from rc_probe.data.batches import batches
from rc_probe.data.samples import load_samples
from rc_probe.difference import diff
from rc_probe.hooks.attach import find_structure
from rc_probe.interventions.paper import paper_variants
from rc_probe.measures.variant_passes import measure_variants
from rc_probe.metrics.stream_metrics import residual
from rc_probe.models.load import Loaded
from rc_probe.models.packaged import DEMOS, with_defaults
from rc_probe.settings import Settings

TEXTS = [
    "One short text.",
    "A second text which is a good deal longer than the first one was.",
    "The third lies between the two in length.",
    "Four.",
    "And a fifth, so that no batch size but one divides their number evenly, for once.",
]
QUICK: dict[str, Any] = {
    "init": False,
    "recursion": False,
    "metrics": ("residual", "cosine", "effective_rank"),
}


def curve(
    frame: pd.DataFrame, variant: str, metric: str = "residual", weights: str = "pretrained"
) -> list[float]:
    rows = frame.query("variant == @variant and metric == @metric and weights == @weights")
    return list(rows.sort_values("layer")["mean"])


@pytest.fixture(scope="module")
def one_by_one(demo: Loaded) -> rc_probe.ProbeResult:
    return rc_probe.probe(demo.model, TEXTS, processor=demo.processor, batch_size=1, **QUICK)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_batch_size_and_padding_change_no_number(
    demo: Loaded, one_by_one: rc_probe.ProbeResult, batch_size: int
) -> None:
    together = rc_probe.probe(demo.model, TEXTS, processor=demo.processor, batch_size=batch_size, **QUICK)
    for variant in ("SAN", "SAN+MLP", "SAN+skip", "transformer"):
        for metric in ("residual", "cosine", "effective_rank"):
            found = curve(together.tables["residuals"], variant, metric)
            wanted = curve(one_by_one.tables["residuals"], variant, metric)
            assert len(found) == 7
            assert found == pytest.approx(wanted, rel=2e-4, abs=1e-6)
    counts = together.tables["residuals"].groupby("metric")["count"].unique().map(list).to_dict()
    assert counts == {"residual": [5], "cosine": [5], "effective_rank": [4]}


def test_order_of_the_samples_changes_no_number(demo: Loaded, one_by_one: rc_probe.ProbeResult) -> None:
    turned = rc_probe.probe(demo.model, TEXTS[::-1], processor=demo.processor, batch_size=2, **QUICK)
    for column in ("mean", "std"):
        found, wanted = (
            r.tables["residuals"]
            .query("variant == 'transformer' and metric == 'residual'")[column]
            .to_numpy()
            for r in (turned, one_by_one)
        )
        assert found == pytest.approx(wanted, rel=1e-4)


def test_mean_and_std_are_those_of_the_samples(demo: Loaded, one_by_one: rc_probe.ProbeResult) -> None:
    values = []
    for text in TEXTS:
        inputs = demo.processor([text], return_tensors="pt")
        with torch.no_grad():
            states = demo.model(**inputs, output_hidden_states=True).hidden_states
        values.append([float(residual(x)) for x in states])
    table = pd.DataFrame(values)
    rows = one_by_one.tables["residuals"].query("variant == 'transformer' and metric == 'residual'")
    assert list(rows["mean"]) == pytest.approx(list(table.mean()), rel=1e-5)
    assert list(rows["std"]) == pytest.approx(list(table.std(ddof=1)), rel=1e-4)


def test_init_weights_and_seeds(demo: Loaded) -> None:
    def run(**settings: Any) -> rc_probe.ProbeResult:
        return rc_probe.probe(
            demo.model,
            TEXTS[:2],
            processor=demo.processor,
            metrics=("residual",),
            recursion=False,
            **settings,
        )

    both, first, second = run(init_seeds=2), run(), run(seed=1)
    a, b = (curve(r.tables["residuals"], "transformer", weights="init") for r in (first, second))
    assert a != b
    pooled = curve(both.tables["residuals"], "transformer", weights="init")
    assert pooled == pytest.approx([(x + y) / 2 for x, y in zip(a, b, strict=True)], rel=1e-12)
    seeds = both.tables["init_seeds"].query("variant == 'transformer'").sort_values(["seed", "layer"])
    assert list(seeds["mean"]) == pytest.approx(a + b, rel=1e-12)
    assert run().tables["residuals"].equals(first.tables["residuals"])
    layer0 = first.tables["residuals"].query("weights == 'init' and layer == 0")["mean"]
    assert layer0.nunique() == 1  # the variants of an init share its weights


def test_ablations_are_variants_and_rows(demo: Loaded) -> None:
    texts = ("mlp@3", "head@2:5", "attention.skip@1-2+mlp@4", "mlp@3=0.5")
    result = rc_probe.probe(demo.model, TEXTS, processor=demo.processor, ablate=texts, **QUICK)
    frame = result.tables["residuals"]
    assert list(frame["variant"].unique()) == ["SAN", "SAN+MLP", "SAN+skip", "transformer", *texts]
    rows = result.tables["ablations"].query("metric == 'residual'").reset_index(drop=True)
    assert list(rows["component"]) == [
        "SAN",
        "SAN+MLP",
        "SAN+skip",
        "mlp",
        "head",
        "attention.skip+mlp",
        "mlp",
    ]
    assert list(rows["layer"][3:]) == ["3", "2", "1-2+4", "3"]
    assert rows["head"][4] == "5"
    whole = curve(frame, "transformer")
    for text, row in zip(texts, rows.iloc[3:].itertuples(), strict=True):
        assert row.value == curve(frame, text)[-1]
        assert row.baseline == whole[-1]
        assert row.change == row.value - row.baseline
        assert curve(frame, text)[0] == whole[0]
        assert curve(frame, text) != whole


@pytest.mark.parametrize("name", ["gpt2", "vit", "xlnet", "swin", "opt", "mixtral"])
def test_other_families_measure_what_they_stream(name: str) -> None:
    model, inputs = zoo.build(name)
    structure = find_structure(model, inputs)
    batch = type("Batch", (), {"inputs": inputs, "mask": None, "start": 0})()
    found, _ = measure_variants(structure, [batch, batch], paper_variants(structure), ["residual"])
    rows = found["transformer"].rows()
    assert [row["layer"] for row in rows] == list(range(structure.depth + 1))
    assert {row["count"] for row in rows} == {4}
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    first = states[0].movedim(1, 0) if name == "xlnet" else states[0]
    if name != "xlnet":
        assert rows[0]["mean"] == pytest.approx(float(residual(first).mean()), rel=1e-6)


@pytest.mark.slow
def test_bert_at_initialisation_is_the_papers_figure(demo: Loaded) -> None:
    """Dong et al. 2021, figure 2, top: BERT-base at initialisation, 12 layers, full texts of 128 tokens."""
    import transformers

    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig()).eval()
    held = Loaded(model, model.config, "bert", None, "text", demo.processor)
    made = batches(load_samples(None, modality="text", samples=4), held, batch_size=4)
    structure = find_structure(model)
    found, _ = measure_variants(structure, made, paper_variants(structure), ["residual"])
    curves = {name: [row["mean"] for row in c.rows()] for name, c in found.items()}
    san = curves["SAN"]
    assert san[0] == pytest.approx(0.58, abs=0.08)
    assert 0.01 < san[1] < 0.04
    assert san[2] < 1e-5
    assert all(5e-8 < value < 5e-7 for value in san[3:])
    assert all(value < 1e-3 for value in curves["SAN+MLP"][3:])
    for name in ("SAN+skip", "transformer"):
        values = curves[name]
        assert values[0] == pytest.approx(san[0])
        assert 0.25 < values[12] < values[0]
        assert all(later < earlier + 0.1 for earlier, later in itertools.pairwise(values))
        assert -0.03 < np.polyfit(range(13), values, 1)[0] < -0.005  # slowly falling


def test_a_packaged_model_says_how_many_samples_it_is_measured_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, from Python and the command, of `diff`, too; a number that is asked for wins."""
    seen: list[int] = []

    def taken(data: Any, *, samples: int, **options: Any) -> Any:
        seen.append(samples)
        raise RcProbeError("enough was seen")

    monkeypatch.setattr(api, "load_samples", taken)
    monkeypatch.setattr(diff, "load_samples", taken)
    monkeypatch.setitem(DEMOS, "demo", replace(DEMOS["demo"], defaults={"samples": 5}))

    def call(run: Callable[[], Any]) -> int:
        with pytest.raises(RcProbeError, match="enough"):
            run()
        return seen.pop()

    assert DEMOS["demo-decoder"].defaults == {"samples": 16, "importance_samples": 8, "path_samples": 8}
    own = with_defaults("demo-decoder", Settings(path_samples=3))
    assert (own.samples, own.importance_samples, own.path_samples) == (16, 8, 3)
    assert call(lambda: rc_probe.probe("demo")) == 5
    assert call(lambda: rc_probe.probe("demo", samples=32)) == 32
    model = tiny.bert()
    assert call(lambda: rc_probe.probe(model, processor=tiny.tokenizer())) == 32
    assert call(lambda: rc_probe.diff("demo", "demo")) == 5
    for more, wanted in (([], 5), (["--samples", "7"], 7)):
        with pytest.raises(SystemExit):
            main(["demo", *more, "--out", str(tmp_path / "out")])
        assert seen.pop() == wanted
