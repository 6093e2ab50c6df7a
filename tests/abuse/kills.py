"""Commands that are killed while they save, and two of them at once: no torn, mixed or stray file, and the next one goes on.

What is measured is made up; everything else is the command's own.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from support.made_results import make_result

from rc_probe import ProbeResult, __version__, api, comparison  # imported once, not by every child
from rc_probe.cli import many_runs, sweep
from rc_probe.cli.app import main
from rc_probe.results.saving import is_whole

NEEDED = (many_runs, sweep)

SCENES: dict[str, list[str]] = {
    "run": ["m", "--out", "o"],
    "sweep": ["sweep", "list.txt", "--out", "o"],
    "series": ["train", "--out", "o"],
    "compare": ["compare", "a", "b", "--out", "o"],
}
QUIET = ["--quiet"]
DAY = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
FIXED = SimpleNamespace(datetime=SimpleNamespace(now=lambda zone: DAY), UTC=datetime.UTC)  # of comparisons
Tree = dict[str, bytes]


def measured(model: str, chosen: Any, **options: Any) -> Any:
    """In place of `api.measure`: a result that tells its model and seed."""
    made = make_result(blocks=2, init=False, paths=False, metrics=["residual"])
    made.model["id"] = model
    made.settings |= {"seed": chosen.seed, "missing": {}}
    made.environment["rc_probe"] = __version__
    made.tables["residuals"].loc[:, "std"] = float(chosen.seed) + len(model)
    return made


def page(self: Any, path: Any = None) -> str:
    """In place of a report: pages cost nearly all of a save."""
    return f"<p>{len(self.tables)}</p>"


def prepare(home: Path) -> None:
    """What the scenes read, the same whenever it is made."""
    for place in ("m", "n", "train/checkpoint-1", "train/checkpoint-2"):
        (home / place).mkdir(parents=True)
        (home / place / "config.json").write_text(json.dumps({"name": place}))
        os.utime(home / place / "config.json", (1, 1))
    (home / "list.txt").write_text("m\nn --seed 2\n")
    for place, model in (("a", "m"), ("b", "n")):
        save(model, 0, home / place)


def save(model: str, seed: int, place: Path) -> None:
    with mock.patch.object(ProbeResult, "to_html", page):
        measured(model, SimpleNamespace(seed=seed)).save(place)


def child(home: Path, words: list[str], before: Callable[[], None] = lambda: None) -> int:
    """The number of a process that runs the command in `home`."""
    number = os.fork()
    if number == 0:
        try:
            os.chdir(home)
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            sys.argv = ["rc-probe", *words]
            api.measure = measured
            comparison.datetime = FIXED  # type: ignore[attr-defined]
            comparison.Comparison.to_html = page  # type: ignore[method-assign]
            ProbeResult.to_html = page  # type: ignore[method-assign]
            before()
            main([*words, *QUIET])
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:
            os._exit(3)
    return number


def ended(number: int) -> int | None:
    """The exit code of a process; None where it was killed."""
    status = os.waitpid(number, 0)[1]
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def dying_at(step: int) -> Callable[[], None]:
    """The process kills itself before its n-th write, replace or unlink."""

    def install() -> None:
        left = [step]

        def counting(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*given, **options)

            return call

        for place, name in ((Path, "write_bytes"), (Path, "write_text"), (Path, "unlink"), (os, "replace")):
            setattr(place, name, counting(getattr(place, name)))

    return install


def tree(home: Path) -> Tree:
    """All files below, by their place."""
    return {
        str(path.relative_to(home)): path.read_bytes() for path in sorted(home.rglob("*")) if path.is_file()
    }


def torn(home: Path) -> list[str]:
    """Folders whose results.json stands there though not all files belong to it."""
    return [str(path.parent) for path in home.rglob("results.json") if not is_whole(path.parent)]


def undisturbed(scene: str, home: Path) -> Tree:
    prepare(home)
    assert ended(child(home, SCENES[scene])) == 0
    return tree(home)


def killed_at_every_step(scene: str, folder: Path, stride: int = 1) -> int:
    """Kill it before each write, replace and unlink, over nothing and over an earlier result. How often it was killed."""
    wanted, kills = undisturbed(scene, folder / "whole"), 0
    for step in range(1, 10_000, stride):
        home = folder / f"step{step}"
        prepare(home)
        if step % 2:  # an earlier result, of another seed, stands there
            save("old", 9, home / "o")
        number = child(home, SCENES[scene], dying_at(step))
        killed = ended(number) is None
        kills += killed
        check(scene, home, wanted)
        if not killed:
            return kills
    return kills


def killed_at_random(scene: str, folder: Path, times: int, seed: int = 0) -> int:
    """Kill it at random moments. How often it was killed before it ended by itself."""
    start = time.monotonic()
    wanted, kills = undisturbed(scene, folder / "whole"), 0
    lasts, draw = time.monotonic() - start, random.Random(seed)
    for count in range(times):
        home = folder / f"random{count}"
        prepare(home)
        number = child(home, SCENES[scene])
        time.sleep(draw.uniform(0, lasts))
        os.kill(number, signal.SIGKILL)
        kills += ended(number) is None
        check(scene, home, wanted)
    return kills


def check(scene: str, home: Path, wanted: Tree) -> None:
    """Nothing is torn; the next one leaves what one that nobody killed leaves, no file more."""
    assert not torn(home), torn(home)
    assert ended(child(home, SCENES[scene])) == 0
    assert not torn(home)
    found = tree(home)
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


def two_at_once(folder: Path, times: int) -> Iterator[int]:
    """Two runs of other seeds into one folder: it is of the one or of the other. Yields whose it was."""
    trees: list[Tree] = []
    for seed in (1, 2):
        home = folder / f"alone{seed}"
        prepare(home)
        assert ended(child(home, [*SCENES["run"], "--seed", str(seed)])) == 0
        trees.append(tree(home / "o"))
    for count in range(times):
        home = folder / f"both{count}"
        prepare(home)
        numbers = [child(home, [*SCENES["run"], "--seed", str(seed)]) for seed in (1, 2)]
        codes = [ended(number) for number in numbers]
        assert codes == [0, 0], codes
        assert not torn(home), torn(home)
        yield 1 + trees.index(tree(home / "o"))
