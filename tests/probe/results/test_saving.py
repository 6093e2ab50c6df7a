"""A save is one thing: killed at any moment it leaves the old result, the new one, or none; never parts of two."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from rc_probe import ProbeResult, RcProbeError
from rc_probe.measures import TABLES
from rc_probe.results import saving
from rc_probe.results.saving import check_folder, is_whole, save_whole, write_files

NAMES = ("residuals", "ablations")


def result(number: int, tables: tuple[str, ...] = NAMES) -> ProbeResult:
    made = {}
    if "residuals" in tables:
        row = {"weights": "pretrained", "variant": "transformer", "layer": 0, "metric": "residual", "mean": float(number),
               "std": None, "count": 1, "floor": 0.0}  # fmt: skip
        made["residuals"] = TABLES["residuals"].frame([row])
    if "ablations" in tables:
        row = {"component": "mlp", "layer": "1", "head": None, "metric": "residual", "value": float(number),
               "baseline": 1.0, "change": 0.0}  # fmt: skip
        made["ablations"] = TABLES["ablations"].frame([row])
    return ProbeResult({"id": "m"}, {"number": number}, {}, made)


def save(one: ProbeResult, folder: Path) -> None:
    """As ProbeResult.save, without drawing a page."""
    from rc_probe.results.files import to_csv

    tables = {f"{name}.csv": to_csv(frame) for name, frame in one.tables.items()}
    save_whole(folder, tables | {"report.html": f"<p>{one.settings['number']}</p>"}, one.to_json)


def number_of(folder: Path) -> int | None:
    """The result that stands there, all of it; None where there is none."""
    if not (folder / "results.json").exists():
        return None
    assert is_whole(folder)
    found = ProbeResult.load(folder)
    number: int = found.settings["number"]
    assert (folder / "report.html").read_text() == f"<p>{number}</p>"
    for name in found.tables:
        assert f"{float(number)}" in (folder / f"{name}.csv").read_text()
    return number


def killed_at(step: int, action: Callable[[], None]) -> bool:
    """Run it in a child that is killed at its n-th write, replace or unlink; False where it came to its end."""
    child = os.fork()
    if child == 0:
        left = [step]

        def counting(real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **options: object) -> object:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            return call

        Path.write_bytes = counting(Path.write_bytes)  # type: ignore[method-assign,assignment]
        Path.unlink = counting(Path.unlink)  # type: ignore[method-assign,assignment]
        os.replace = counting(os.replace)  # type: ignore[assignment]
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_save_that_is_killed_at_any_step(tmp_path: Path) -> None:
    seen, step = set(), 1
    while True:
        home = tmp_path / str(step)
        save(result(1), home)
        killed = killed_at(step, lambda home=home: save(result(2, ("residuals",)), home))  # type: ignore[misc]
        seen.add(number_of(home))
        save(result(3, ("residuals",)), home)  # the next run
        assert number_of(home) == 3
        assert sorted(p.name for p in home.iterdir()) == ["report.html", "residuals.csv", "results.json"], (
            step
        )
        if not killed:
            break
        step += 1
    assert seen == {1, None, 2} and step > 8


def _many(home: Path, number: int, times: int) -> None:
    for _ in range(times):
        save(result(number, NAMES[: 1 + number % 2]), home)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_two_writers_at_once(tmp_path: Path) -> None:
    writers = [get_context("fork").Process(target=_many, args=(tmp_path / "o", n, 100)) for n in (1, 2)]
    for one in writers:
        one.start()
    while any(one.is_alive() for one in writers):
        for one in writers:
            one.join(0.02)
    assert number_of(tmp_path / "o") in (1, 2)
    names = {p.name for p in (tmp_path / "o").iterdir()}
    assert names == {
        "report.html",
        "results.json",
        *(f"{n}.csv" for n in ProbeResult.load(tmp_path / "o").tables),
    }
    assert [one.exitcode for one in writers] == [0, 0]


STEPS = ("mkdir", "rmdir", "unlink", "open", "replace", "stat", "scandir", "lstat")  # of os, and io.open


def met_at(
    step: int, monkeypatch: pytest.MonkeyPatch, action: Callable[[], None], other: Callable[[], None]
) -> bool:
    """Run `action`, and all of `other` before its n-th look at the disk or change of it; False where it has fewer."""
    left, met = [step], []

    def meeting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                met.append(step)
                other()
            return real(*given, **options)

        return call

    with monkeypatch.context() as patched:
        for name in STEPS:
            patched.setattr(os, name, meeting(getattr(os, name)))
        patched.setattr(io, "open", meeting(io.open))
        action()
    return bool(met)


def put(number: int, home: Path) -> None:
    page = {"report.html": f"{number}"}
    save_whole(home, page, lambda files: json.dumps({"schema": 1, "files": files, "tables": {}}))


def put_there(home: Path) -> str:
    assert is_whole(home) and not list(home.parent.rglob(".*"))
    return (home / "report.html").read_text()


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("saves", [False, True])
def test_a_folder_is_tried_while_another_run_is_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool, saves: bool
) -> None:
    """Whatever the other does in between, in the same folder and in one beside it."""

    def other(home: Path) -> None:
        for place in (home, home.with_name("n")):
            check_folder(place, "--out x")
            if saves:
                put(2, place)

    for step in range(1, 1000):
        home = tmp_path / f"{step}" / "o" / "m"
        if earlier:
            put(1, home)
        trying = partial(check_folder, home, "--out x")
        if not met_at(step, monkeypatch, trying, partial(other, home)):
            break
        put(3, home)
        assert put_there(home) == "3"
    assert step >= 8


def test_a_folder_is_tried_while_another_run_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 1000):
        home = tmp_path / f"{step}" / "o"
        if step % 2:
            put(1, home)
        if not met_at(step, monkeypatch, partial(put, 2, home), partial(check_folder, home, "--out x")):
            break
        assert put_there(home) == "2"
    assert step > 20


def test_what_only_tries_a_folder_does_not_make_it_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.html").write_text("mine")
    seen = []

    def other() -> None:
        with pytest.raises(RcProbeError, match="did not write it"):
            check_folder(tmp_path, "--out x")
        seen.append(len(list(tmp_path.glob(".try.*"))))

    for step in range(1, 1000):
        trying = partial(check_folder, tmp_path, "--out x", ["results.json"])
        if not met_at(step, monkeypatch, trying, other):
            break
    assert max(seen) == 1


def test_what_others_wrote_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(RcProbeError, match=r"report.html is there already, and rc-probe did not write it"):
        save(result(1), tmp_path)
    with pytest.raises(RcProbeError, match="did not write it"):
        check_folder(tmp_path, "--out x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    save(result(1), other)  # nothing of it is in the way
    assert number_of(other) == 1 and (other / "notes.txt").read_text() == "mine"


def test_a_file_that_was_changed_is_seen(tmp_path: Path) -> None:
    save(result(1), tmp_path / "o")
    assert is_whole(tmp_path / "o")
    with (tmp_path / "o" / "residuals.csv").open("a") as file:
        file.write("x")
    assert not is_whole(tmp_path / "o") and not is_whole(tmp_path / "none")


def test_a_full_disk_leaves_the_old_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(result(1), tmp_path / "o")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_bytes", full)
        with pytest.raises(RcProbeError, match="No space left on device"):
            save(result(2), tmp_path / "o")
    assert number_of(tmp_path / "o") == 1
    assert not [p for p in (tmp_path / "o").iterdir() if p.name.startswith(".")]


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b", "--out x")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for place, says in (
        ("file", "is a file"),
        ("file/below", "cannot be written"),
        ("x" * 300, "cannot be written"),
    ):
        with pytest.raises(RcProbeError, match=says):
            check_folder(tmp_path / place, "--out x")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere" / "at all")
    with pytest.raises(RcProbeError, match="cannot be written"):
        check_folder(tmp_path / "gone", "--out x")


def test_single_files(tmp_path: Path) -> None:
    write_files(tmp_path / "o", {"a.csv": "1\n", "b.json": "{}"})
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["a.csv", "b.json"]
    assert saving.digest("1\n") == "4355a46b19d348dc2f57c046f8ef63d4538ebb936000f3c9ee954a27460dd865"
