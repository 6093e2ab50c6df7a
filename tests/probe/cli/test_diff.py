"""The command `rc-probe diff`: its files, its exit codes, what it refuses before anything is loaded."""

import json
from pathlib import Path

import pytest
from support import tiny
from support.command import Run, fails
from support.two_models import TEXTS, gpt2, perturbed


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    home, model = tmp_path_factory.mktemp("models"), gpt2()
    other = perturbed(model, "transformer.h.1.mlp.c_proj.weight", 0.2)
    (home / "texts.txt").write_text("\n".join(TEXTS))
    pair = [
        tiny.saved(home / name, one, tiny.tokenizer()) for name, one in (("base", model), ("tuned", other))
    ]
    return [*pair, str(home / "texts.txt")]


def test_files_and_exit_codes(run: Run, places: list[str]) -> None:
    a, b, data = places
    given = ("diff", a, b, "--data", data, "--metrics", "residual")
    code, out, err = run(*given, "--fail-if", "difference@max>0.0001", "--fail-if", "agreement<0.0001")
    assert code == 1
    assert "FAIL: difference@max>0.0001" in err and "pass: agreement<0.0001" in err
    assert "On the same inputs block 2 differs most" in out
    home = Path("rc-probe-out/base-and-tuned")
    assert {path.name for path in home.iterdir()} == {
        "report.html", "results.json", "differences.csv", "checks.csv",
    }  # fmt: skip
    saved = json.loads((home / "results.json").read_text())
    assert (saved["kind"], saved["a"]["name"], saved["b"]["name"]) == ("difference", "base", "tuned")
    assert saved["settings"]["command"] == f"rc-probe diff {a} {b} --data {data} --metrics residual"
    for more, folder in ((["--no-sensitivity"], "base-and-tuned-2"), ([], "base-and-tuned")):
        _, out, _ = run(*given, *more)
        assert out.rstrip().endswith(f"Report: rc-probe-out/{folder}/report.html")
    code, out, _ = run(*given, "--quiet", "--json", "--out", "d")
    assert (code, json.loads(out)["kind"]) == (0, "difference")
    code, _, err = run(*given, "--quiet", "--fail-if", "cka@min<0.5", "--out", "d")
    assert code == 2 and "cka of stream was not measured" in err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--fail-if", "diffrence@max>1"], "Did you mean 'difference'"),
        (["--fail-if", "sensitivity@max>1", "--no-sensitivity"], "no sensitivity is measured"),
        (["--num-processes", "0"], "--num-processes"),
        (["--num-processes", "2", "--device-map", "auto"], "would spread a whole model over all devices"),
        (["--threshold", "-1"], "--threshold: -1.0 is no threshold"),
        (["--quantise-b", "int3"], "--quantise-b: nothing is called 'int3'"),
        (["--data", "nowhere/x.txt"], "nowhere/x.txt"),
    ],
)
def test_refused_before_anything_is_loaded(
    run: Run,
    more: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rc_probe.models.load.load_model", None)
    fails(run, said, "diff", "no/such-model", "no/other", *more)


def test_a_layer_that_is_not_there(run: Run, places: list[str]) -> None:
    a, b, data = places
    fails(run, "there is no layer 4", "diff", a, b, "--data", data, "--fail-if", "difference@4>1")
