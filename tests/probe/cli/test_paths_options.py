"""Paths in the command, in its tables and in `rc_probe.probe`."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from support.command import fails
from support.random_models import randomise

import rc_probe
from rc_probe.cli.app import path_numbers
from rc_probe.models.load import Loaded

Run = Callable[..., tuple[int, str, str]]
FAST = ["--no-init", "--no-recursion", "--metrics", "residual", "--length", "12", "--samples", "3"]


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (
            ["m", "--paths", "5", "20", "--repeats", "3"],
            ["m", "--paths", "--path-draws", "5 20", "--repeats", "3"],
        ),
        (["--paths", "5,20", "m"], ["--paths", "--path-draws", "5 20", "m"]),
        (["m", "--paths=5"], ["m", "--paths", "--path-draws", "5"]),
        (["m", "--paths"], ["m", "--paths"]),
        (["--paths", "m", "5"], ["--paths", "m", "5"]),
        (["m", "--samples", "5", "--no-paths"], ["m", "--samples", "5", "--no-paths"]),
    ],
)
def test_numbers_behind_paths(words: list[str], options: list[str]) -> None:
    assert path_numbers(words) == options


def test_what_is_no_number_behind_paths_is_one_line(run: Run) -> None:
    for word in ("--paths=x", "--paths=5,x", "--paths=2.5"):
        code, out, err = run("demo", word)
        assert (code, out) == (2, "")
        assert err.startswith("rc-probe: --paths: ") and err.count("\n") == 1


def test_one_sample_has_no_spread(run: Run, texts: Path) -> None:
    """Its numbers are numbers without an interval."""
    options = ["--data", str(texts), "--out", "o", "--quiet", *FAST, "--samples", "1"]
    assert run("demo", *options)[0] == 0
    result = rc_probe.ProbeResult.load("o")
    sources = result.tables["path_sources"]
    assert len(sources) and sources["mean"].notna().all()
    for column in ("std", "low", "high"):
        assert sources[column].dtype == float and sources[column].isna().all()


def test_tables_of_the_default_run(run: Run, texts: Path) -> None:
    assert run("demo", "--data", str(texts), "--out", "o", "--quiet", *FAST)[0] == 0
    result = rc_probe.ProbeResult.load(Path("o"))
    paths = result.tables["paths"]
    assert set(paths.estimator) == {"exact", "full", "baseline"}
    assert set(paths.scope) == {"alone", "up_to", "all_but", "none", "full", "baseline"}
    alone = paths[(paths.estimator == "exact") & (paths.scope == "alone")]
    assert sorted(alone.length.unique()) == [0, 1, 2, 3, 4, 5, 6]
    counts = alone.drop_duplicates("length").sort_values("length")["count"].tolist()
    assert list(map(int, counts)) == [1, 72, 2160, 34560, 311040, 1492992, 2985984]
    parts = paths[(paths.estimator == "exact") & paths.scope.isin(["alone", "none"])]
    for metric in ("projection", "norm_share"):  # lengths and biases
        assert parts[parts.metric == metric]["mean"].sum() == pytest.approx(1, abs=1e-5)
    last = paths[(paths.scope == "up_to") & (paths.length == 6) & (paths.metric == "agreement")]
    assert last["mean"].tolist() == [1.0]
    mine = result.tables["path_counts"].query("model == 'all-MiniLM-L6-v2'")
    assert mine["share"].sum() == pytest.approx(1)
    assert set(result.tables["path_sources"].source) == {"tokens", "positions", "bias"}
    assert set(result.tables["chains"].length) == {1, 2, 3, 4, 5, 6}
    facts = result.model["paths"]
    assert facts["task"] == "retrieval"
    assert 0 < facts["euler_error"] < 1e-5
    assert facts["samples"] == 3
    assert pd.read_csv(Path("o/paths.csv"), dtype={"count": str})["count"].dropna().tolist()[0] == "1"


def test_drawn_paths(run: Run, texts: Path) -> None:
    words = ["--paths", "2", "--repeats", "3", "--max-length", "1", "--seed", "4"]
    code, _, err = run("demo", "--data", str(texts), "--out", "o", "--quiet", *FAST, *words)
    assert (code, err) == (0, "")
    paths = rc_probe.ProbeResult.load(Path("o")).tables["paths"]
    assert set(paths.estimator) == {"exact", "sampled", "live", "full", "baseline"}
    exact, sampled = (
        paths[(paths.estimator == name) & (paths.metric == "projection")].set_index("length")["mean"]
        for name in ("exact", "sampled")
    )
    assert sampled[0] == pytest.approx(exact[0], abs=1e-6)  # there is one path of length 0
    assert sampled[1] == pytest.approx(exact[1], abs=0.6)  # six draws of heads are few
    assert set(paths[paths.estimator == "sampled"].length) == {0, 1, 2}  # longer ones together
    assert set(paths[paths.estimator == "live"].length) == {0, 1}
    assert set(paths[paths.estimator == "live"].drawn) == {2}


def test_none(run: Run, texts: Path) -> None:
    assert run("demo", "--data", str(texts), "--out", "o", "--quiet", "--no-paths", *FAST)[0] == 0
    result = rc_probe.ProbeResult.load(Path("o"))
    assert not {"paths", "path_counts", "path_sources", "chains"} & set(result.tables)
    assert result.settings["command"].endswith("--svd-samples 4") is False


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--paths", "0"], "--paths: 0 is too small"),
        (["--repeats", "1"], "--repeats: 1 is too small"),
        (["--max-length", "-2"], "--max-length: -2 is too small"),
        (["--path-samples", "0"], "--path-samples: 0 is too small"),
    ],
)
def test_options_that_cannot_be_meant(run: Run, words: list[str], says: str) -> None:
    fails(run, says, "demo", *words)


def test_models_whose_paths_cannot_be_told_apart_keep_their_curves(demo: Loaded) -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=31000, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = transformers.MambaModel(config).eval()
    randomise(model, torch.float32)
    result = rc_probe.probe(
        model,
        ["a b c d e f g h", "i j k l m n o p q"],
        processor=demo.processor,
        init=False,
        metrics=["residual"],
    )
    assert "paths" not in result.tables
    assert "residuals" in result.tables
    assert result.model["paths"] == {}
    assert any("Paths were not measured" in note and "mixer" in note for note in result.model["notes"])


def test_half_precision_has_paths(demo: Loaded) -> None:
    result = rc_probe.probe("demo", dtype="bfloat16", samples=2, length=8, init=False, metrics=["residual"])
    assert result.settings["dtype"] == "bfloat16" and not [n for n in result.model["notes"] if "Paths" in n]
    shares = result.tables["paths"].query("metric == 'norm_share'")["mean"].sum()
    assert shares == pytest.approx(1, abs=1e-6)


def test_the_module_is_there_without_an_import() -> None:
    assert rc_probe.paths.decompose.__module__ == "rc_probe.paths.decompose"


def test_an_estimator_that_fails_leaves_the_others(demo: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    from rc_probe.hooks.errors import RcProbeError
    from rc_probe.paths import effectiveness as effect

    def sample(*args: object, **options: object) -> None:
        raise RcProbeError("its heads cannot be told apart")

    monkeypatch.setattr(effect, "sample", sample)
    result = rc_probe.probe(
        "demo",
        samples=3,
        length=8,
        init=False,
        recursion=False,
        metrics=["residual"],
        path_draws=2,
        repeats=2,
    )
    assert set(result.tables["paths"].estimator) == {"exact", "live", "full", "baseline"}
    assert any("Paths were not sampled" in note and "told apart" in note for note in result.model["notes"])
