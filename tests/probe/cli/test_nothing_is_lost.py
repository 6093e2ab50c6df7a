"""What is measured is kept: a later measurement that fails, has no memory or is interrupted takes nothing with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from support import massive, tiny
from support.command import Run

from rc_probe import ProbeResult, probe
from rc_probe.measures import MEASUREMENTS
from rc_probe.models.load import Loaded
from rc_probe.settings import Settings

pytestmark = pytest.mark.usefixtures("no_figures")

SMALL = [
    "--samples", "4", "--length", "12", "--no-init", "--path-samples", "2", "--importance", "blocks", "--drop", "1", "--quiet",
]  # fmt: skip
ASKED: dict[str, Any] = {
    "samples": 4, "length": 12, "init": False, "path_samples": 2, "importance": "blocks", "drop": 1,
}  # fmt: skip
LATER = [each for each in MEASUREMENTS if not each.needed and each.wanted(Settings.of(**ASKED))]
MEMORY = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    def run(self: Any, context: Any) -> Any:
        raise error

    kind = type(next(each for each in MEASUREMENTS if each.name == name))
    monkeypatch.setattr(kind, "run", run)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small BERT of random weights, where every measurement has something to say."""
    torch.manual_seed(0)
    return tiny.saved(
        tmp_path_factory.mktemp("model") / "m", massive.gpt2(2.8e5, equal=False), tiny.tokenizer()
    )


@pytest.fixture(scope="module")
def whole(model: str) -> ProbeResult:
    return probe(model, **ASKED)


def same_tables(found: ProbeResult, whole: ProbeResult, without: set[str]) -> None:
    assert set(found.tables) - {"checks"} == set(whole.tables) - without
    for name in set(found.tables) - {"structure", "checks", "path_counts"}:
        pd.testing.assert_frame_equal(found.tables[name], whole.tables[name], check_exact=True)


@pytest.mark.parametrize("name", [each.name for each in LATER])
def test_no_memory_for_a_measurement(
    run: Run, model: str, whole: ProbeResult, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, name, RuntimeError(MEMORY))
    code, _, err = run(model, *SMALL, "--out", "o", "--fail-if", "residual_bulk@last<0.1")
    assert code == 0, err
    found = ProbeResult.load("o")
    gone = {table.name for each in LATER if each.name == name for table in each.tables}
    same_tables(found, whole, gone)
    assert found.settings["missing"] == {name: "out of memory. Try a smaller --batch-size or --length"}
    assert any("not measured: out of memory" in note for note in found.model["notes"])
    assert "not measured: out of memory" in Path("o/report.html").read_text()
    assert found.tables["checks"]["passed"].tolist() == [True]


@pytest.mark.parametrize("name", [each.name for each in LATER])
def test_an_interrupt_in_a_measurement(
    run: Run, model: str, whole: ProbeResult, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, name, KeyboardInterrupt())
    code, _, err = run(model, *SMALL, "--out", "o", "--fail-if", "residual_bulk@last>0.1")
    place = next(i for i, each in enumerate(LATER) if each.name == name)
    left = [each.name for each in LATER[place:]]
    assert code == 130
    assert err.splitlines()[-1] == f"rc-probe: interrupted. Saved without {', '.join(left)}: o"
    found = ProbeResult.load("o")
    same_tables(found, whole, {table.name for each in LATER[place:] for table in each.tables})
    assert found.settings["missing"] == dict.fromkeys(left, "interrupted")
    assert found.tables["checks"]["passed"].tolist() == [False], "it is decided all the same"


def test_a_fault_of_ours_is_said_and_loses_nothing(
    run: Run, whole: ProbeResult, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a check it does not look like success; the checks that are decided decide."""
    spoil(monkeypatch, "chains", KeyError("tables"))
    line = "rc-probe: chains was not measured: a fault of rc-probe (KeyError: 'tables')\n"
    code, _, err = run(model, *SMALL, "--out", "o")
    assert code == 2 and err == line
    same_tables(ProbeResult.load("o"), whole, {"chains"})
    missing = json.loads(Path("o/results.json").read_text())["settings"]["missing"]
    assert missing == {"chains": "a fault of rc-probe (KeyError: 'tables')"}
    for condition, wanted in (("residual_bulk@last<0.1", 0), ("residual_bulk@last>0.1", 1)):
        code, _, err = run(model, *SMALL, "--out", "o", "--fail-if", condition)
        assert code == wanted and line in err
    Path("m.txt").write_text(f"{model}\n{model} --no-chains\n")
    code, _, err = run("sweep", "m.txt", *SMALL, "--out", "s")
    assert code == 2 and err == line.replace("rc-probe", "m", 1)


def test_the_curves_are_needed(run: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "curves", RuntimeError(MEMORY))
    code, _, err = run(model, *SMALL, "--out", "o")
    assert (code, err.count("\n")) == (2, 1) and "out of memory" in err
    assert not Path("o/results.json").exists()


def test_from_python_an_interrupt_is_an_interrupt(demo: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the model that the user holds is as it was."""
    before = {key: value.clone() for key, value in demo.model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in demo.model.modules())
    spoil(monkeypatch, "floor", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        probe(demo.model, samples=2, length=12, init=False, paths=False, processor=demo.processor)
    assert all(torch.equal(value, before[key]) for key, value in demo.model.state_dict().items())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in demo.model.modules())


def test_a_run_that_was_interrupted_is_made_again(
    run: Run, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("m.txt").write_text(f"{model}\n{model} --length 14\n")
    with monkeypatch.context() as spoiled:
        spoil(spoiled, "chains", KeyboardInterrupt())
        code, _, err = run("sweep", "m.txt", *SMALL, "--out", "o")
    assert code == 130 and "interrupted. 0 of 2 runs are finished" in err
    code, _, err = run("sweep", "m.txt", *[word for word in SMALL if word != "--quiet"], "--out", "o")
    assert code == 0 and "there already" not in err
    assert "chains" in ProbeResult.load("o/m").tables


# ---- folders


def test_other_settings_get_a_folder_of_their_own(run: Run) -> None:
    fast = ["--samples", "2", "--length", "12", "--no-init", "--no-paths", "--no-recursion"]
    assert run("demo", *fast)[0] == 0
    first = Path("rc-probe-out/demo/results.json").read_bytes()
    code, _, err = run("demo", *fast, "--seed", "3")
    line = (
        "rc-probe: rc-probe-out/demo holds a run with other settings; this one goes to rc-probe-out/demo-2\n"
    )
    assert (code, err) == (0, line)
    assert Path("rc-probe-out/demo/results.json").read_bytes() == first
    assert ProbeResult.load("rc-probe-out/demo-2").settings["seed"] == 3
    assert run("demo", *fast, "--seed", "3")[2] == line, "the same settings overwrite"
    assert sorted(p.name for p in Path("rc-probe-out").iterdir()) == ["demo", "demo-2"]
    code, _, err = run("demo", *fast, "--seed", "4", "--out", "rc-probe-out/demo-2")
    assert (code, err) == (
        0,
        "rc-probe: rc-probe-out/demo-2 holds a run with other settings, which this one replaces\n",
    )


def test_a_folder_of_the_users_is_refused_before_anything_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rc_probe.api.load_model", lambda *given, **options: pytest.fail("loaded"))
    Path("mine").mkdir()
    Path("mine/report.html").write_text("mine")
    code, _, err = run("demo", "--out", "mine")
    assert code == 2 and "report.html is there already, and rc-probe did not write it" in err
    assert Path("mine/report.html").read_text() == "mine"


def test_lines_of_a_sweep_never_share_a_folder(run: Run, demo: Loaded) -> None:
    for place in ("m", "deep/m"):
        tiny.saved(Path(place), tiny.bert(), tiny.tokenizer())
    Path("list.txt").write_text("./m\n./deep/../deep/m\nm/\n")
    fast = ["--samples", "2", "--length", "12", "--no-init", "--no-paths", "--no-recursion", "--quiet"]
    code, _, err = run("sweep", "list.txt", *fast, "--out", "o")
    assert code == 0, err
    folders = [p for p in Path("o").iterdir() if p.is_dir()]
    assert len(folders) == 3 and all((p / "results.json").is_file() for p in folders)
    assert len({ProbeResult.load(p).settings["asked"]["model"] for p in folders}) == 3
