"""The command, called in this process."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rc_probe.cli.app import main
from rc_probe.models.load import Loaded

FAST = [
    "--no-init",
    "--no-recursion",
    "--no-paths",
    "--no-attention",
    "--no-embeddings",
    "--metrics",
    "residual",
]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text(
        "A first text of some words.\nAnd a second one.\nA third <b>text</b> & more.\n", encoding="utf-8"
    )
    return path


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], demo: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Run:
    """The command in process, in an empty folder; `demo` is loaded once for all tests."""
    from rc_probe import api
    from rc_probe.models import load

    def loading(model_id: str, **options: Any) -> Loaded:
        return (
            demo
            if model_id == "demo" and (options["dtype"], options["device"]) == ("auto", None)
            else load.load_model(model_id, **options)
        )

    monkeypatch.setattr(api, "load_model", loading)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            main(list(arguments))
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def fails(run: Run, says: str, *arguments: str, ends: int = 2) -> None:
    """One line on standard error, the exit code, nothing written."""
    code, out, err = run(*arguments)
    assert code == ends
    assert out == ""
    assert re.search(says, err), err
    assert err.startswith("rc-probe: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert not list(Path().rglob("*"))
