"""Checkpoints and lists of models: all measured, finished ones left alone, a failing one does not stop the others."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny

from rc_probe import api
from rc_probe.cli.app import main
from rc_probe.cli.finished_runs import asked
from rc_probe.cli.job import Job
from rc_probe.data import samples as data
from rc_probe.data.columns import Wanted
from rc_probe.data.read_once import Opened, reading_once
from rc_probe.hooks.errors import RcProbeError
from rc_probe.models.checkpoints import Checkpoint, checkpoints
from rc_probe.result import ProbeResult
from rc_probe.results.checks import Checks
from rc_probe.settings import Settings

pytestmark = pytest.mark.usefixtures("no_figures")

FAST = ["--data", "t.txt", "--no-recursion", "--no-paths", "--metrics", "residual"]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command in an empty folder with texts: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("w1 w2 w3 w4 w5\nw6 w7 w8\n")

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            main(list(words))
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were loaded, in order."""
    seen: list[str] = []
    load = api.load_model

    def loading(model: str, **options: Any) -> Any:
        seen.append(model)
        return load(model, **options)

    monkeypatch.setattr(api, "load_model", loading)
    return seen


def save_training(
    folder: Path, steps: tuple[int, ...] = (500, 1000, 1500), without: int | None = None
) -> None:
    """Checkpoints of a tiny BERT whose embeddings shrink to their mean; one of them without a tokenizer."""
    torch.manual_seed(0)
    model = tiny.bert()
    for step in steps:
        tiny.saved(folder / f"checkpoint-{step}", model, None if step == without else tiny.tokenizer())
        with torch.no_grad():
            for weight in (
                model.embeddings.word_embeddings.weight,
                model.embeddings.position_embeddings.weight,
            ):
                weight.copy_(weight.mean(0) + 0.3 * (weight - weight.mean(0)))


def names(found: list[Checkpoint]) -> list[str]:
    return [each.name for each in found]


# ---- which checkpoints


def folders(root: Path, *models: str) -> str:
    for name in models:
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")
    return str(root)


def test_a_folder_of_checkpoints_is_no_model(tmp_path: Path) -> None:
    run = folders(tmp_path / "run", "checkpoint-1000", "checkpoint-500", "checkpoint-10000")
    (tmp_path / "run" / "logs").mkdir()
    found = checkpoints(run, None)
    assert names(found) == ["checkpoint-500", "checkpoint-1000", "checkpoint-10000"]
    assert [each.step for each in found] == [500, 1000, 10000]
    assert found[0].model == str(tmp_path / "run" / "checkpoint-500") and found[0].revision is None
    (tmp_path / "run" / "config.json").write_text("{}")
    assert checkpoints(run, None) == [], "the model that a Trainer saved at the end"
    assert names(checkpoints(run, "checkpoint-*")) == names(found)
    assert names(checkpoints(run, "checkpoint-1000,checkpoint-500")) == ["checkpoint-500", "checkpoint-1000"]
    with pytest.raises(RcProbeError, match="Did you mean 'checkpoint-500'"):
        checkpoints(run, "checkpoint-50")
    assert checkpoints(folders(tmp_path / "one", "."), None) == []
    assert checkpoints("gpt2", None) == []
    assert checkpoints(str(tmp_path / "nothing"), None) == []


def test_adapters_are_checkpoints_too(tmp_path: Path) -> None:
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-3" / "adapter_config.json").write_text("{}")
    assert [each.step for each in checkpoints(str(tmp_path), None)] == [3]


def test_revisions_of_a_hub_model() -> None:
    found = checkpoints("org/pythia", "step1000, step0,step1000")
    assert [(each.model, each.revision, each.step) for each in found] == [
        ("org/pythia", "step0", 0), ("org/pythia", "step1000", 1000),
    ]  # fmt: skip
    told = checkpoints("m", "stage1-step1000-tokens5B,stage1-step200-tokens1B")
    assert [each.step for each in told] == [200, 1000]
    mixed = checkpoints("m", "main,step5")
    assert [(each.name, each.step) for each in mixed] == [("main", None), ("step5", None)], (
        "as they were given"
    )
    assert [each.step for each in checkpoints("m", "v1.2,v1.3")] == [None, None]
    for model, revisions, revision in (("m", "a,b", "c"), ("m", " , ", None), ("demo", "a", None)):
        with pytest.raises(RcProbeError, match="--revision"):
            checkpoints(model, revisions, revision)


# ---- over training


@pytest.mark.figures("comparison")
def test_a_folder_of_checkpoints_is_followed(call: Call, loads: list[str]) -> None:
    save_training(Path("run"))
    code, out, err = call("run", *FAST, "--out", "o")
    assert code == 0, err
    assert "[2/3] checkpoint-1000: measured" in err and "after step 1,500" in out
    rows = json.loads(Path("o/results.json").read_text())["tables"]["runs"]
    assert [row["step"] for row in rows] == [500, 1000, 1500]
    for row in rows:
        own = ProbeResult.load(Path("o") / row["run"])
        last = own.residuals.query("layer == 2 and variant == 'transformer'")["mean"].item()
        assert row["last"] == last
        assert own.settings["init_seeds"] == 0, "fresh weights are the same for all"
        assert own.settings["command"].startswith(f"rc-probe run/{row['run']} --data t.txt")
        assert own.settings["command"].endswith(
            f"--no-init --metrics residual --no-recursion --no-paths --out o/{row['run']}"
        )
    assert rows[0]["first"] > rows[1]["first"] > rows[2]["first"], "these tokens do come together"
    page = Path("o/report.html").read_text()
    assert len(set(re.findall(r"<title>(step \d+, layer \d): ", page))) == 9
    assert loads == [f"run/checkpoint-{step}" for step in (500, 1000, 1500)]


def test_the_command_that_a_run_names_repeats_it(call: Call) -> None:
    import shlex

    save_training(Path("run"), (1, 2))
    assert call("run", *FAST, "--ablate", "mlp@1", "--no-special-tokens", "--out", "o")[0] == 0
    before = ProbeResult.load("o/checkpoint-2")
    words = shlex.split(before.settings["command"])
    assert call(*words[1:-1], "again")[0] == 0
    after = ProbeResult.load("again")
    for name, table in before.tables.items():
        assert table.equals(after.tables[name])


def test_a_failing_checkpoint_stops_no_other(call: Call) -> None:
    save_training(Path("run"), without=1000)
    code, out, err = call("run", *FAST, "--out", "o")
    assert code == 2
    assert re.search(r"^rc-probe: \[2/3\] checkpoint-1000: .*no tokenizer", err, re.MULTILINE)
    assert "Not measured: checkpoint-1000" in out
    saved = json.loads(Path("o/results.json").read_text())["tables"]
    assert [row["run"] for row in saved["runs"]] == ["checkpoint-500", "checkpoint-1500"]
    assert [row["name"] for row in saved["failures"]] == ["checkpoint-1000"]
    assert "checkpoint-1000" in Path("o/report.html").read_text()


def test_checks_hold_for_every_checkpoint(call: Call) -> None:
    save_training(Path("run"))
    code, _, err = call("run", *FAST, "--fail-if", "residual@first<0.5", "--quiet", "--out", "o")
    assert code == 1
    firsts = [
        ProbeResult.load(f"o/checkpoint-{step}").table("checks")["passed"].item()
        for step in (500, 1000, 1500)
    ]
    assert firsts[0] and not firsts[2]
    assert "checkpoint-1500: FAIL: residual@first<0.5" in err and "checkpoint-500" not in err
    assert call("run", *FAST, "--fail-if", "residual@9<0.5", "--quiet", "--out", "o")[0] == 2


# ---- a list


@pytest.mark.figures("comparison")
def test_a_sweep_measures_each_line_with_its_options(call: Call, loads: list[str]) -> None:
    tiny.saved(Path("a"), tiny.bert(), tiny.tokenizer())
    tiny.saved(Path("b"), tiny.bert(num_hidden_layers=3), tiny.tokenizer())
    Path("m.txt").write_text(
        "# models\na --length 4\n\n./b   # deeper\nnowhere/at-all/x\na --dtype float64\n"
    )
    code, out, err = call("sweep", "m.txt", "--length", "6", *FAST, "--no-init", "--out", "o")
    assert code == 2
    assert {path.name for path in Path("o").iterdir() if path.is_dir()} == {
        "a_length_4",
        "b",
        "a_dtype_float64",
    }
    settings = {
        name: ProbeResult.load(f"o/{name}").settings for name in ("a_length_4", "b", "a_dtype_float64")
    }
    assert [s["length"] for s in settings.values()] == [4, 6, 6]
    assert settings["a_dtype_float64"]["dtype"] == "float64"
    assert all(s["init_seeds"] == 0 and s["metrics"] == ["residual"] for s in settings.values())
    assert settings["b"]["command"] == (
        "rc-probe ./b --data t.txt --length 6 --no-init --metrics residual --no-recursion --no-paths --out o/b"
    )
    assert "Not like for like: length is 4 in a length 4" in out
    assert "[3/4] x: nowhere/at-all/x: no such folder" in err
    assert loads == ["a", "./b", "nowhere/at-all/x", "a"]
    saved = json.loads(Path("o/results.json").read_text())
    assert [row["blocks"] for row in saved["tables"]["runs"]] == [2, 3, 2]
    assert "By relative depth" in Path("o/report.html").read_text()


def test_what_is_finished_is_not_made_again(call: Call, loads: list[str]) -> None:
    for name in "ab":
        tiny.saved(Path(name), tiny.bert(), tiny.tokenizer())
    Path("m.txt").write_text("a\nb\n")
    words = ["sweep", "m.txt", *FAST, "--no-init", "--out", "o"]

    def again(*more: str) -> list[str]:
        loads.clear()
        code, _, err = call(*words, *more)
        assert code == 0, err
        assert err.count("there already, with the same settings") == 2 - len(loads)
        return list(loads)

    assert again() == ["a", "b"]
    assert again() == []
    assert again("--no-resume") == ["a", "b"]
    Path("o/b/results.json").write_text(Path("o/b/results.json").read_text()[:100])  # cut off
    assert again() == ["b"]
    Path("o/a/report.html").unlink()
    assert again() == ["a"]
    assert again("--length", "5") == ["a", "b"], "other settings"
    assert again("--length", "5") == []
    tiny.saved(Path("b"), tiny.bert(), tiny.tokenizer())
    os.utime("b/model.safetensors", (1, 1))
    assert again("--length", "5") == ["b"], "trained on"
    Path("t.txt").write_text("w1 w2 w3 w4 w6\nw6 w7 w8 w9\n")
    assert again("--length", "5") == ["a", "b"], "other texts of the same name"
    saved = json.loads(Path("o/a/results.json").read_text())
    saved["environment"]["rc_probe"] = "0.0.1"
    Path("o/a/results.json").write_text(json.dumps(saved))
    assert again("--length", "5") == ["a"], "another version of rc-probe"


def test_checks_are_looked_at_in_finished_runs_too(call: Call, loads: list[str]) -> None:
    tiny.saved(Path("a"), tiny.bert(), tiny.tokenizer())
    Path("m.txt").write_text("a\n")
    words = ["sweep", "m.txt", *FAST, "--no-init", "--out", "o", "--quiet"]
    assert call(*words) == (0, "", "")
    loads.clear()
    code, _, err = call(*words, "--fail-if", "residual@last>0.01")
    assert (code, loads) == (1, [])
    assert "FAIL: residual@last>0.01" in err
    assert ProbeResult.load("o/a").table("checks")["passed"].tolist() == [False]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a --lenght 3\n", "m.txt, line 1: --lenght: no such option. Did you mean --length\\?"),
        ("a\nb --samples 0\n", "m.txt, line 2: --samples: 0 is too small"),
        ("a --out x\n", "line 1: --out is no option of a line"),
        ("a --revisions x,y\n", "line 1: --revisions is no option of a line"),
        ("a --fail-if residul@last<1\n", "line 1: .*Did you mean 'residual'"),
        ("a --ablate mlpp\n", "did you mean 'mlp'"),
        ("a --paths=x\n", "line 1: --paths: 'x' are no numbers of paths"),
        ("a --num-processes 2\n", "line 1: --num-processes: several processes share the samples of one run"),
        ("a --log-with tensorboard\n", "line 1: --log-with: trackers get the result of one model"),
        ("a 'b\n", "line 1: No closing quotation"),
        ("a --help\n", "line 1: it asks for no measurement"),
        ("a\n# b\na\n", "a is listed twice"),
        ("# nothing\n", "names no model"),
    ],
)
def test_a_bad_list_is_refused_before_the_first_run(
    call: Call, loads: list[str], text: str, says: str
) -> None:
    Path("m.txt").write_text(text)
    code, _, err = call("sweep", "m.txt", "--out", "o")
    assert code == 2
    assert re.search(says, err), err
    assert err.count("\n") == 1, "of the list, not of a run"
    assert loads == [] and not Path("o").exists()


def test_tasks_of_the_harness_that_changed_are_not_taken_for_the_same(call: Call) -> None:
    Path("tasks").mkdir()
    Path("tasks/t.yaml").write_text("task: t\n")
    job = Job("m", Settings(data="lm-eval:t:tasks"), Checks(), Path("o"), "")
    before = asked(job)
    assert asked(job) == before
    Path("tasks/t.yaml").write_text("task: t\ntest_split: test\n")
    assert asked(job) != before


@pytest.mark.parametrize(("option", "value"), [("--num-processes", "2"), ("--log-with", "tensorboard")])
def test_a_sweep_refuses_what_is_for_one_run(call: Call, loads: list[str], option: str, value: str) -> None:
    Path("m.txt").write_text("a\n")
    code, out, err = call("sweep", "m.txt", option, value, "--out", "o")
    assert (code, out, loads) == (2, "", [])
    assert f"{option}: " in err and err.count("\n") == 1
    assert not Path("o").exists()


def test_the_command_of_a_run_has_the_numbers_behind_paths(call: Call) -> None:
    tiny.saved(Path("a"), tiny.bert(), tiny.tokenizer())
    Path("m.txt").write_text("a\na --no-paths\n")
    fast = [word for word in FAST if word != "--no-paths"]
    assert call("sweep", "m.txt", "--paths", "2", "3", *fast, "--no-init", "--out", "o")[0] == 0
    words = ProbeResult.load("o/a").settings["command"]
    assert " --paths 2 3 " in words and "path-draws" not in words
    words = ProbeResult.load("o/a_no-paths").settings["command"]
    assert " --no-paths " in words and "2 3" not in words and "path-draws" not in words


def test_a_list_that_is_not_there(call: Call) -> None:
    assert call("sweep", "none.txt")[0] == 2
    code, _, err = call("sweep", ".")
    assert code == 2 and "cannot be read" in err
    Path("m.txt").write_text("no/such/model\n")
    code, _, err = call("sweep", "m.txt", "--out", "o")
    assert code == 2 and "none of 1 runs could be made" in err
    assert not Path("o").exists()


def test_models_of_one_name_have_folders_of_their_own(call: Call) -> None:
    for name in ("x/m", "y/m"):
        tiny.saved(Path(name), tiny.bert(), tiny.tokenizer())
    Path("m.txt").write_text("x/m\ny/m\n")
    assert call("sweep", "m.txt", *FAST, "--no-init", "--out", "o")[0] == 0
    assert {path.name for path in Path("o").iterdir() if path.is_dir()} == {"x_m", "y_m"}


def test_an_unforeseen_error_stops_no_other(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        tiny.saved(Path(name), tiny.bert(), tiny.tokenizer())
    Path("m.txt").write_text("a\nb\n")
    load = api.load_model

    def loading(model: str, **options: Any) -> Any:
        if model == "a":
            raise RuntimeError("out\nof the blue")
        return load(model, **options)

    monkeypatch.setattr(api, "load_model", loading)
    code, _, err = call("sweep", "m.txt", *FAST, "--no-init", "--out", "o")
    assert code == 2
    assert "rc-probe: [1/2] a: RuntimeError: out of the blue\n" in err
    assert Path("o/b/results.json").is_file()


def test_an_interrupt_keeps_what_is_finished(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        tiny.saved(Path(name), tiny.bert(), tiny.tokenizer())
    Path("m.txt").write_text("a\nb\n")
    load = api.load_model

    def loading(model: str, **options: Any) -> Any:
        if model == "b":
            raise KeyboardInterrupt
        return load(model, **options)

    monkeypatch.setattr(api, "load_model", loading)
    code, _, err = call("sweep", "m.txt", *FAST, "--no-init", "--quiet", "--out", "o")
    assert code == 130
    assert err == "rc-probe: interrupted. 1 of 2 runs are finished; the same command goes on\n"
    assert Path("o/a/results.json").is_file() and not Path("o/results.json").exists()


# ---- data read once


def test_inside_kept_a_source_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def opening(spec: str, wanted: Wanted) -> Opened:
        def rows() -> Any:
            for i in range(10):
                read.append(f"{spec} {wanted.column} {i}")
                yield f"text {i}", None

        return Opened(spec, rows())

    monkeypatch.setattr(data, "_open", opening)

    def texts(count: int, **options: Any) -> list[Any]:
        return data.load_samples("s", modality="text", samples=count, **options).items

    with reading_once():
        assert texts(3) == ["text 0", "text 1", "text 2"]
        assert texts(2, fits=lambda text: text != "text 0") == ["text 1", "text 2"]
        assert len(read) == 3
        assert texts(5)[-1] == "text 4" and len(read) == 5
        assert len(texts(99)) == 10 and len(read) == 10
        texts(1, column="c")
        assert read[-1] == "s c 0", "another column is another source"
    texts(1)
    assert len(read) == 12, "outside it is read anew"
