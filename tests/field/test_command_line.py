"""What people type: one line for each mistake, with the near name; found before anything is loaded."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support import tiny
from support.command import FAST, Run

import rc_probe
from rc_probe.results.files import to_csv


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["swep", "list.txt"], "swep: no such command or model. Did you mean sweep?"),
        (["compar", "a", "b"], "compar: no such command or model. Did you mean compare?"),
        (["dmeo"], "dmeo: no such command or model. Did you mean demo?"),
        (["demo", "--sampels", "3"], "--sampels: no such option. Did you mean --samples?"),
        (["demo", "--no-itin"], "--no-itin: no such option. Did you mean --no-init?"),
        (["demo", "--qxyz"], "--qxyz: no such option. rc-probe --help lists all"),
        (["compare", "--uot", "x", "y"], "--uot: no such option. Did you mean --out?"),
        (["lm-eval", "demo", "--task", "x"], "--task: no such option. Did you mean --tasks?"),
        (["demo", "--samples", "x"], "Invalid value for '--samples'"),
        (["demo", "--samples"], "--samples"),
        (["demo", "--num-processes", "0"], "Invalid value for '--num-processes'"),
        ([], "Missing argument"),
        (["sweep"], "Missing argument"),
        (["lm-eval", "demo"], "--tasks"),
        (["demo", "extra"], "(extra)"),
        (["demo", "--device", "tpu"], "no such device 'tpu'"),
        (["demo", "--revision", "x"], "--revision x: demo lies on this machine. Leave it out"),
        (["demo", "--no-paths", "--count-mlp"], "--count-mlp: it changes nothing: paths are not measured. Leave it out, or leave --no-paths out"),
        (["demo", "--no-paths", "--max-length", "3"], "--max-length: it changes nothing"),
        (["demo", "--no-init", "--init-seeds", "3"], "--init-seeds: it changes nothing"),
        (["demo", "--out", ""], "--out: '' is no path"),
        (["demo", "--out", "x" * 300], "cannot be written (File name too long)"),
        (["demo", "--out", "/proc/x"], "cannot be written"),
        (["demo", "--out", "link"], "cannot be written"),
        (["demo", "--column", ""], "--column: it is empty"),
        (["demo", "--fail-if", "residual@" + "9" * 5000 + "<0.1"], "is no layer"),
        (["demo", "--ablate", "mlp@1-99999999999999999999"], "is beyond 9,999"),
        (["architectures", "zzz"], "zzz: nothing of that name"),
    ],
)  # fmt: skip
def test_one_line(run: Run, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rc_probe import api
    from rc_probe.models.load import check_device

    def loading(*args: object, **options: object) -> None:
        check_device(options["device"])  # type: ignore[arg-type]
        pytest.fail("loaded")

    monkeypatch.setattr(api, "load_model", loading)
    Path("link").symlink_to("gone/away")
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("rc-probe: ") and says in err and len(err) < 600, err


def test_a_layer_that_the_model_has_not_costs_no_run(run: Run, tmp_path: Path) -> None:
    model = tiny.saved(tmp_path / "bert", tiny.bert(), tiny.tokenizer())
    data = tmp_path / "a.txt"
    data.write_text("w1 w2 w3\n")
    code, out, err = run(model, "--data", str(data), "--fail-if", "residual@3<0.1", *FAST)
    assert (code, out) == (2, "")
    assert (
        err.endswith("--fail-if residual@3<0.1: there is no layer 3. Give 0 to 2, or last\n")
        and err.count("\n") == 1
    )
    assert not Path("rc-probe-out").exists()


def test_help_lists_the_commands_and_the_version(run: Run) -> None:
    _, out, _ = run("--help")
    for name in ("sweep", "compare", "lm-eval", "architectures", "--show-completion"):
        assert name in out
    for flag in ("-V", "--version"):
        assert run(flag) == (0, f"rc-probe {rc_probe.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [("rc-probe sw", ["sweep"]), ("rc-probe ./m --sam", ["--samples"]), ("rc-probe compare --o", ["--out"]),
     ("rc-probe ./m --fail", ["--fail-if"]), ("rc-probe l", ["lm-eval"])],
)  # fmt: skip
def test_the_shell_completes(
    run: Run, words: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_RC_PROBE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    code, out, _ = run()
    assert code == 0 and out.split() == wanted


def test_the_list_of_architectures_breaks_no_word_at_60_columns(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = run("architectures", "llama")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 60
    assert any(line.split() == ["llama4_text", "proved"] for line in lines)
    assert "attention by interface" in " ".join(out.split())


def test_a_closed_pipe_is_no_failed_check() -> None:
    """`rc-probe architectures --json | head -1`."""
    command = [sys.executable, "-m", "rc_probe", "architectures", "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("words", "ends"),
    [
        (["architectures", "bert"], 141),  # rich prints it, and would end with 1
        (["architectures", "bert", "--json"], 141),
        (["--version"], 141),  # so would the parser
        (["--help"], 141),
        (["compare", "--help"], 141),
        (["demo", "--data", "TEXTS", *FAST], 141),  # short enough to be held back until the end
        (["compare", "no", "such"], 2),
    ],
)
def test_whoever_stops_reading_ends_the_command_quietly(
    words: list[str], ends: int, texts: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(OSError), os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        code, _, err = run(*(word.replace("TEXTS", str(texts)) for word in words))
    assert (code, err.count("\n")) == (ends, 0 if ends == 141 else 1)
    assert bool(list(Path().rglob("report.html"))) == (words[0] == "demo")  # saved before anything is said


def test_line_breaks_in_names_start_no_command_on_github(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A baseline's settings, a column of the data and a folder may be called anything."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    bad = "x\n::set-env name=PATH::/tmp\u2028::error::y"
    model = tiny.saved(tmp_path / "a\n::stop-commands::z", tiny.bert(), tiny.tokenizer())
    data = tmp_path / "a.csv"
    data.write_text(f'"{bad}",text\nw1,w1 w2 w3\n')
    given = [model, "--data", str(data), *FAST]
    assert run(*given, "--out", "before")[0] == 0
    result = rc_probe.ProbeResult.load("before")
    result.settings["modality"] = bad
    result.save("before")
    code, out, err = run(*given, "--baseline", "before", "--out", "now")
    assert code == 2 and "kind of data was x ::set-env" in err
    for line in [*out.splitlines(), *err.splitlines()]:
        assert not line.lstrip().startswith("::") or line.startswith("::error title=rc-probe::"), line
    code, out, err = run("compare", "before", "now", "--out", "both")
    assert code == 0 and not any(line.lstrip().startswith("::") for line in out.splitlines())


def test_a_cell_of_a_csv_is_no_formula() -> None:
    frame = pd.DataFrame({"run": ["=1+1", "@x", "-y", "a=b", None], "change": [-1.5, 2.0, -0.1, 0.0, np.nan]})
    assert to_csv(frame) == "run,change\n'=1+1,-1.5\n'@x,2.0\n'-y,-0.1\na=b,0.0\n,\n"
