"""Checks that fail a build: right exit code each, closed where something is missing; and what a build shows."""

import copy
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support import tiny
from support.made_results import make_result
from support.places import ROOT

import rc_probe
from rc_probe.cli.app import main
from rc_probe.cli.github import annotation, markdown, tell
from rc_probe.data.digest import digest_of
from rc_probe.hooks.errors import RcProbeError
from rc_probe.result import ProbeResult
from rc_probe.results.checks import Checks, exit_code, table_of
from rc_probe.results.conditions import parse_condition, parse_drop
from rc_probe.settings import Settings

pytestmark = pytest.mark.usefixtures("no_figures")

VALUES = [0.8, 0.3, 0.05, 0.6]
DOCS = ROOT / "docs"


def result_of(values: list[float] = VALUES, floor: float = 1e-7, **settings: Any) -> ProbeResult:
    """A result of one curve, residual of the transformer, and of its cosine, 1 - r²."""
    rows = [
        {"weights": "pretrained", "variant": "transformer", "layer": layer, "metric": metric, "mean": mean,
         "std": 0.0, "count": 4, "floor": floor}
        for metric, curve in (("residual", values), ("cosine", [1 - v**2 for v in values]))
        for layer, mean in enumerate(curve)
    ]  # fmt: skip
    rows += [row | {"weights": "init", "mean": 1e-5} for row in rows]
    model = {"id": "m", "blocks": len(values) - 1}
    common = {"data": "t.txt", "digest": "d", "samples": 4, "length": 8, "tokens": 30, "modality": "text"}
    return ProbeResult(model, common | settings, {}, {"residuals": pd.DataFrame(rows)})


def code(result: ProbeResult, *conditions: str, **baseline: Any) -> int:
    return exit_code(Checks.of(conditions, **baseline).evaluate(result), result)


# ---- conditions


@pytest.mark.parametrize(
    ("where", "value"),
    [("first", 0.8), ("last", 0.6), ("min", 0.05), ("max", 0.8), ("mean", 0.4375), ("1", 0.3), ("0", 0.8)],
)
def test_where(where: str, value: float) -> None:
    for text, expected in ((f"residual@{where}<{value + 1e-9}", 1), (f"residual@{where}<{value - 1e-9}", 0)):
        (found,) = Checks.of([text]).evaluate(result_of())
        assert found.value == pytest.approx(value, rel=1e-12)
        assert exit_code([found], result_of()) == expected
    assert code(result_of(), f"residual@{where}>{value - 1e-9}") == 1


@pytest.mark.parametrize(("op", "fails"), [("<", False), ("<=", True), (">", False), (">=", True)])
def test_operators_at_the_limit_itself(op: str, fails: bool) -> None:
    assert code(result_of(), f"residual@2 {op} 0.05") == int(fails)


def test_the_layer_of_an_extreme_is_told() -> None:
    (found,) = Checks.of(["residual@min<0.1"]).evaluate(result_of())
    assert (found.layer, found.passed) == (2, False)
    assert found.line == "FAIL: residual@min<0.1: 0.05 at layer 2"


def test_a_variant_and_its_gate() -> None:
    condition = parse_condition(" residual @ last : mlp@4=0.5 <= 1e-1 ")
    assert (condition.variant, condition.op, condition.limit) == ("mlp@4=0.5", "<=", 0.1)
    assert parse_condition("residual@3:SAN+skip>0.2").variant == "SAN+skip"
    assert parse_condition("residual@3>0.2").variant == "transformer"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("residul@last<0.1", "no metric is called 'residul'. Did you mean 'residual'?"),
        ("residual@lats<0.1", "'lats' is no layer. Did you mean 'last'?"),
        ("residual@-1<0.1", "'-1' is no layer"),
        ("residual<0.1", "where is missing"),
        ("residual@last", "without quotes the shell takes"),
        ("residual@last==0.1", "never equal"),
        ("residual@last!=0.1", "never equal"),
        ("residual@last=0.1", "never equal"),
        ("residual@last<nan", "'nan' is not a number"),
        ("residual@last<inf", "'inf' is not a number"),
        ("residual@last<ten", "'ten' is not a number"),
        ("residual@last<0.1<0.2", "not a condition"),
        ("", "nothing to compare"),
        ("residual@last<0", "never holds, for residual lies in 0 to 2"),
        ("residual@last>=0", "always holds"),
        ("residual_frobenius@last>1", "never holds"),
        ("cosine@last<-1.5", "never holds"),
        ("norm@last>=0", "always holds, for norm lies in 0 to ∞"),
    ],
)
def test_what_is_misspelt_is_refused(text: str, says: str) -> None:
    with pytest.raises(RcProbeError, match=re.escape(says)) as error:
        parse_condition(text)
    assert str(error.value).startswith("--fail-if ")


# ---- failing closed


def test_nan_is_an_error_wherever_it_can_matter() -> None:
    spoilt = result_of([0.8, math.nan, 0.5])
    for where in ("last", "min", "max", "mean", "1"):
        assert code(spoilt, f"residual@{where}<0.1") == 2
    assert code(result_of([0.8, 0.5, math.nan]), "residual@last<0.1") == 2


def test_a_missing_layer_metric_variant_or_table_is_an_error() -> None:
    short = result_of()
    short.tables["residuals"] = short.tables["residuals"].query("layer < 3")
    assert code(short, "residual@last<0.1") == 2
    assert code(result_of(), "residual@4<0.1") == 2
    assert code(result_of(), "norm@last<0.1") == 2
    assert code(result_of(), "residual@last:SAN<0.1") == 2
    assert code(ProbeResult({}, {}, {}), "residual@last<0.1") == 2
    old = result_of()
    del old.tables["residuals"]["floor"]
    assert code(old, "residual@last<0.1") == 2
    assert code(result_of(), baseline=old) == 2


def test_an_error_is_not_hidden_by_a_failure_or_a_pass() -> None:
    assert code(result_of(), "residual@last<0.1", "residual@min<0.1") == 1
    assert code(result_of(), "residual@last<0.1", "residual@min<0.1", "residual@9<0.1") == 2


def test_noise_is_not_compared_with_noise() -> None:
    noise = result_of([0.8, 3e-8], floor=1e-7)
    assert code(noise, "residual@last<1e-8") == 2
    assert code(noise, "residual@last<0.1") == 1
    assert code(noise, "residual@last>0.1") == 0


def test_what_is_not_measured_is_refused_beforehand() -> None:
    chosen = Settings(metrics=("residual",), ablate=("mlp@3",))
    Checks.of(["residual@last:mlp@3<0.1", "residual@last:SAN+MLP<0.1"]).plan(chosen)
    with pytest.raises(RcProbeError, match="cosine is not measured"):
        Checks.of(["cosine@last>0.9"]).plan(chosen)
    with pytest.raises(RcProbeError, match="no variant 'mlp@4' is measured"):
        Checks.of(["residual@last:mlp@4<0.1"]).plan(chosen)
    with pytest.raises(RcProbeError, match="svd-samples"):
        Checks.of(["stable_rank@last<2"]).plan(Settings(svd_samples=0))


# ---- a baseline


def test_a_drop_names_its_layers(tmp_path: Path) -> None:
    result_of([0.8, 0.35, 0.125, 0.7]).save(tmp_path)
    (found,) = Checks.of(baseline=ProbeResult.load(tmp_path / "results.json")).evaluate(result_of())
    assert (found.passed, found.layer) == (False, 3)
    assert found.value == pytest.approx(0.1)
    assert "0.1 at layer 3 (0.7 → 0.6)" in found.said
    assert "0.075 at layer 2 (0.125 → 0.05)" in found.said
    assert "layer 1" not in found.said, "0.05 itself is no more than 0.05, to rounding"
    assert code(result_of(), baseline=ProbeResult.load(tmp_path), max_drop=0.11) == 0


def test_worse_is_the_metrics_own_direction() -> None:
    better, worse = result_of([0.8, 0.7]), result_of([0.8, 0.5])
    assert code(worse, baseline=better, max_drop="cosine=0.1") == 1
    assert code(better, baseline=worse, max_drop="cosine=0.1") == 0
    assert code(better, baseline=worse) == 0
    with pytest.raises(RcProbeError, match="neither better nor worse"):
        parse_drop("norm=1")
    with pytest.raises(RcProbeError, match="no metric is called 'residul'"):
        parse_drop("residul=1")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"samples": 5}, "samples was 4 in the baseline and is 5"),
        ({"length": 16}, "length was 8"),
        ({"tokens": 31}, "tokens measured was 30"),
        ({"digest": "e"}, r"data was t\.txt \(d…\)"),
        ({"modality": "image"}, "kind of data was text"),
    ],
)
def test_another_measurement_cannot_be_compared(changes: dict[str, Any], says: str) -> None:
    (found,) = Checks.of(baseline=result_of()).evaluate(result_of(**changes))
    assert found.passed is None
    assert re.search(says, found.said)


def test_another_baseline_cannot_be_compared() -> None:
    deeper = result_of([0.8, 0.3, 0.05, 0.6, 0.6])
    assert code(result_of(), baseline=deeper) == 2
    without = result_of()
    without.tables["residuals"] = without.tables["residuals"].query("metric == 'cosine'")
    assert code(result_of(), baseline=without) == 2
    fewer = result_of()
    fewer.tables["residuals"]["count"] = 3
    assert code(result_of(), baseline=fewer) == 2
    assert code(result_of(), baseline=result_of([math.nan, 0.3, 0.05, 0.6])) == 2


def test_samples_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    assert code(result_of(data="/a/t.txt"), baseline=result_of(data="t.txt")) == 0
    assert code(result_of(digest=None), baseline=result_of()) == 0, "by name where one has no digest"
    assert code(result_of(digest=None, data="u.txt"), baseline=result_of()) == 2
    (tmp_path / "a").write_bytes(b"one")
    lists: list[list[Any]] = [
        ["ab", "c"], ["a", "bc"], ["abc"], [b"abc"], [np.array([0.0])], [np.array([0])], [(np.array([0]), 16)],
        [{"bytes": b"x"}], [tmp_path / "a"], [],
    ]  # fmt: skip
    digests = [digest_of(items) for items in lists]
    assert len(set(digests)) == len(lists) and None not in digests
    assert [digest_of(copy.deepcopy(items)) for items in lists] == digests
    (tmp_path / "b").write_bytes(b"one")
    assert digest_of([tmp_path / "b"]) == digests[8], "a file is what it holds"
    assert digest_of([object()]) is None


# ---- Python


def test_a_result_checks_itself(tmp_path: Path) -> None:
    result = result_of()
    assert [found.passed for found in result.fail_if("residual@last<0.1", baseline=result)] == [True, True]
    with pytest.raises(AssertionError, match=r"FAIL: residual@min<0\.1: 0\.05 at layer 2"):
        result.fail_if("residual@min<0.1")
    with pytest.raises(RcProbeError, match="no layer 9"):
        result.fail_if("residual@9<0.1")
    with pytest.raises(RcProbeError, match="nothing to check"):
        result.fail_if()
    with pytest.raises(RcProbeError, match="it needs baseline"):
        result.fail_if("residual@last<0.1", max_drop=0.1)
    with pytest.raises(RcProbeError, match="cannot read the results"):
        result.fail_if(baseline=tmp_path / "none")


# ---- what is written and shown


def checked(*conditions: str) -> ProbeResult:
    result = make_result(blocks=3, init=False)
    result.tables["checks"] = table_of(Checks.of(conditions).evaluate(result))
    return result


def test_the_table_is_saved_and_the_report_lists_it(tmp_path: Path) -> None:
    result = checked("residual@last<0.1", "residual@last:SAN<0.1", "residual@9<0.1")
    result.save(tmp_path)
    back = ProbeResult.load(tmp_path)
    pd.testing.assert_frame_equal(back.table("checks"), result.table("checks"))
    rows = json.loads((tmp_path / "results.json").read_text())["tables"]["checks"]
    assert [row["passed"] for row in rows] == [True, False, None]
    assert rows[2]["value"] is None and rows[1]["value"] < 0.1
    page = (tmp_path / "report.html").read_text()
    listed = re.findall(r'<li class="(\w+)"><span class="level">([\w ]+)</span> (residual@\S+)', page)
    assert listed == [
        ("healthy", "pass", "residual@last&lt;0.1:"),
        ("collapsed", "fail", "residual@last:SAN&lt;0.1:"),
        ("watch", "not evaluated", "residual@9&lt;0.1:"),
    ]
    assert "<h2>Checks</h2>" not in make_result(blocks=2).to_html()


def test_what_github_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    outcomes = Checks.of(["residual@last<0.1", "residual@min<0.1"]).evaluate(result_of())
    said: list[str] = []
    tell("<m>|x", "It stands.", outcomes, said.append, quiet=True)
    assert said == [
        "FAIL: residual@min<0.1: 0.05 at layer 2",
        "::error title=rc-probe::<m>|x: FAIL: residual@min<0.1: 0.05 at layer 2",
    ]
    tell("again", "It stands.", outcomes, said.append, quiet=False)
    text = summary.read_text("utf-8")
    assert "### rc-probe: &lt;m&gt;\\|x\n" in text and "### rc-probe: again\n" in text
    assert "| ❌ fail | residual@min&lt;0.1 | 0.05 at layer 2 |\n" in text
    assert "| ✅ pass | residual@last&lt;0.1 | 0.6 at layer 3 |\n" in text
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))  # a folder
    said.clear()
    tell("m", "It stands.", outcomes, said.append, quiet=True)
    assert "cannot be written" in said[-1]
    monkeypatch.delenv("GITHUB_ACTIONS")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    said.clear()
    tell("m", "It stands.", outcomes, said.append, quiet=False)
    assert said == ["pass: residual@last<0.1: 0.6 at layer 3", "FAIL: residual@min<0.1: 0.05 at layer 2"]


def test_a_line_break_does_not_end_an_annotation() -> None:
    assert annotation("100 %\n::error::x\r") == "::error title=rc-probe::100 %25%0A::error::x%0D"
    assert markdown("a\n# b", "c", []).splitlines()[0] == "### rc-probe: a # b"


# ---- the command


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command on a tiny model: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    tiny.saved(tmp_path / "model", tiny.bert(), tiny.tokenizer())
    Path("t.txt").write_text("w1 w2 w3 w4 w5\nw6 w7 w8\n")
    fast = [
        "--data",
        "t.txt",
        "--no-init",
        "--no-recursion",
        "--metrics",
        "residual",
        "--quiet",
        "--out",
        "o",
    ]

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["model", *fast, *words])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


def test_exit_codes_of_the_command(command: Any) -> None:
    assert command("--fail-if", "residual@last<0.01") == (0, "", "")
    measured, out, err = command("--fail-if", "residual@last>0.01", "--fail-if", "residual@last<0.01")
    assert (measured, out) == (1, "")
    assert re.fullmatch(r"FAIL: residual@last>0\.01: 0\.\d+ at layer 2\n", err)
    assert ProbeResult.load("o").table("checks")["passed"].tolist() == [False, True]
    measured, out, err = command("--baseline", "o", "--samples", "1", "--out", "p", "--json")
    assert measured == 2 and err.startswith(
        "ERROR: drop of residual>0.05: cannot be compared: data was t.txt"
    )
    assert json.loads(out)["tables"]["checks"][0]["passed"] is None


def test_a_misspelt_condition_is_refused_before_anything_is_loaded(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rc_probe import api

    monkeypatch.setattr(api, "load_model", lambda *args, **options: pytest.fail("loaded"))
    for words, says in (
        (["--fail-if", "residul@last<0.1"], "Did you mean 'residual'"),
        (["--fail-if", "cosine@last>0.9"], "cosine is not measured"),
        (["--max-drop", "0.1"], "it needs --baseline"),
        (["--baseline", "none.json"], "none.json: cannot read the results"),
        (["--baseline", "t.txt"], "not a file of results"),
    ):
        measured, out, err = command(*words)
        assert (measured, out) == (2, "")
        assert says in err and err.count("\n") == 1
    assert not Path("o").exists()


def test_a_fault_of_ours_is_no_failed_check(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rc_probe import api

    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(api, "load_model", broken)
    measured, out, err = command("--fail-if", "residual@last<0.1")
    assert (measured, out) == (2, "")
    assert "RuntimeError: unforeseen" in err


def test_a_baseline_of_the_command(command: Any) -> None:
    command("--fail-if", "residual@last<0.01")
    Path("o").rename("base")
    assert command("--baseline", "base/results.json", "--max-drop", "0") == (0, "", "")
    saved = json.loads(Path("base/results.json").read_text())
    for row in saved["tables"]["residuals"]:
        row["mean"] += 0.2 * (row["layer"] == 1)
    Path("base/results.json").write_text(json.dumps(saved))
    measured, _, err = command("--baseline", "base")
    assert measured == 1
    assert re.fullmatch(r"FAIL: drop of residual>0\.05: 0\.2 at layer 1 \(.* → .*\), against base\n", err)
    measured, _, err = command("--baseline", "base", "--length", "4")
    assert measured == 2
    assert "length was" in err
    Path("t.txt").write_text("w1 w2 w3 w4 w9\nw6 w7 w8\n")
    measured, _, err = command("--baseline", "base")
    assert measured == 2
    assert "data was t.txt (lines) (" in err, "another text of the same name and length"


# ---- docs/ci.md


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / "ci.md").read_text("utf-8"), re.DOTALL)


def test_the_pytest_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, with `./my-model` beside it: green on a healthy model, red on a collapsed one."""
    import torch

    (example,) = blocks("python")
    (tmp_path / "test_collapse.py").write_text(example)
    (tmp_path / "texts.txt").write_text("w1 w2 w3 w4 w5\nw6 w7 w8\n")
    torch.manual_seed(0)
    model = tiny.bert()
    tiny.saved(tmp_path / "my-model", model, tiny.tokenizer())
    monkeypatch.chdir(tmp_path)
    rc_probe.probe("./my-model", "texts.txt", init=False, recursion=False, paths=False).save("tests/baseline")

    def run() -> tuple[int, str]:
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_collapse.py"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    code, said = run()
    assert code == 0 and "2 passed" in said, said
    with torch.no_grad():  # all tokens equal: every word and position the same, and nothing but noise
        for name, weight in model.embeddings.named_parameters():
            weight.copy_(weight[:1].expand_as(weight)) if "embeddings.weight" in name else None
    tiny.saved(tmp_path / "my-model", model, tiny.tokenizer())
    code, said = run()
    assert code == 1 and "2 failed" in said and "FAIL: residual_bulk@last<0.1" in said


def test_the_workflow_is_yaml_and_its_command_is_ours() -> None:
    import shlex

    import typer
    import yaml

    from rc_probe.cli.app import app

    (workflow,) = blocks("yaml")
    steps = yaml.safe_load(workflow)["jobs"]["collapse"]["steps"]
    (step,) = [step for step in steps if step.get("run", "").startswith("rc-probe")]
    words = shlex.split(step["run"].replace("\\\n", " "))[1:]
    context = typer.main.get_command(app).make_context("rc-probe", words)
    Checks.of(context.params["fail_if"])
    assert context.params["baseline"]


def removed() -> ProbeResult:
    result = make_result(blocks=3, drops={"criterion": "loss"})
    columns = {"baseline": 3.0, "low": None, "high": None, "count": 16}
    result.tables["importance"] = result.declared["importance"].frame(
        {
            "component": part,
            "block": n,
            "head": None,
            "metric": "loss",
            "value": 3 + change,
            "change": change,
            **columns,
        }
        for part, costs in (("block", (0.5, 0.001, 2.0)), ("mlp", (0.1, 0.2, 0.3)))
        for n, change in enumerate(costs, 1)
    )
    result.tables["drops"] = result.declared["drops"].frame(
        {"method": "greedy", "draw": None, "split": split, "step": n, "component": "block", "block": n, "metric": "loss",
         "value": 3 + change, "change": change, **columns}
        for split, costs in (("chosen", (0.01, 0.02)), ("held_out", (0.05, 0.15)))
        for n, change in enumerate(costs, 1)
    )  # fmt: skip
    return result


@pytest.mark.parametrize(
    ("condition", "value", "place", "holds"),
    [
        ("importance@min<0.01", 0.001, 2, True), ("importance@3>2.5", 2.0, 3, False), ("importance@first:mlp>0.05", 0.1, 1, True),
        ("importance@mean>1", 0.8336666666666667, None, False), ("drops@last>0.1", 0.15, 2, True), ("drops@1>0.1", 0.05, 1, False),
    ],
)  # fmt: skip
def test_removals_can_be_checked(condition: str, value: float, place: int | None, holds: bool) -> None:
    (outcome,) = Checks.of([condition]).evaluate(removed())
    assert (outcome.value, outcome.layer, outcome.passed) == (pytest.approx(value), place, not holds)


def test_removals_that_were_not_measured_are_unknown() -> None:
    for condition, says in (
        ("importance@min:attention<0", "importance of attention was not measured"),
        ("importance@4>0", "there is no block 4, only 1 to 3"), ("drops@3>0", "there is no removal 3, only 1 to 2"),
    ):  # fmt: skip
        (outcome,) = Checks.of([condition]).evaluate(removed())
        assert outcome.passed is None and outcome.said == says
    assert Checks.of(["importance@min<0"]).evaluate(make_result(blocks=2))[0].passed is None


@pytest.mark.parametrize(
    ("condition", "options", "says"),
    [
        ("importance@min<0", {"importance": "none"}, "importance is not measured. Add --importance blocks"),
        (
            "importance@min:mlp<0",
            {},
            "importance of 'mlp' is not measured. There are block; --importance parts measures",
        ),
        ("drops@last>0", {}, "nothing is dropped. Add --drop or --drop-until"),
        (
            "drops@last:best>0",
            {"drop": 1},
            "drops of 'best' is not measured. There are greedy, angular, random",
        ),
        ("importances@last>0", {}, "Did you mean 'importance'?"),
    ],
)
def test_checks_of_removals_are_planned(condition: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RcProbeError, match=re.escape(says)):
        Checks.of([condition]).plan(Settings(**options))
    Checks.of(["importance@min:mlp<0", "drops@last>0"]).plan(Settings(importance="parts", drop=1))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("residual@3<0.1", "no layer 3"), ("importance@0>1", "no block 0"), ("importance@3>1", "no block 3"),
        ("drops@0>1", "no removal 0"),
    ],
)  # fmt: skip
def test_places_that_no_model_of_two_blocks_has(text: str, said: str) -> None:
    with pytest.raises(RcProbeError, match=said):
        Checks.of([text]).fit(2)
    Checks.of(["residual@0<0.1", "residual@2<0.1", "importance@1>1", "importance@2>1", "drops@9>1"]).fit(2)
