"""The house holds: one way for imports, small folders and files, nothing left out of the package, one command for CI."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.places import ROOT, TESTS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
HOMES = {"rc_probe": "probe", "rc_probe.hooks": "hooks", "rc_probe.reports": "reports"}
CODE = [*HOMES.values(), "benchmarks"]
MOST_FILES, MOST_LINES = 14, 350


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is installed: one folder `rc_probe`, which the import linter can read."""
    folder = tmp_path_factory.mktemp("tree")
    for package, source in HOMES.items():
        place = folder.joinpath(*package.split("."))
        shutil.copytree(
            ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
        )
    return folder


def contract(tree: Path) -> tuple[int, str]:
    """Exit code and answer of `lint-imports` on the tree."""
    call = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command(sys.argv[1:])"
    words = [sys.executable, "-c", call, str(ROOT / "pyproject.toml"), "--no-cache"]
    done = subprocess.run(words, cwd=tree, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_imports_run_one_way(tree: Path) -> None:
    code, said = contract(tree)
    assert code == 0, said
    assert re.search(r"Contracts: [5-9] kept, 0 broken", said), said


SPOILED = {
    "Imports run one way": ("measures/rows.py", "def late():\n    from rc_probe.api import probe"),
    "Inside hooks": ("hooks/structure/tape.py", "from rc_probe.hooks.edits import edits"),
    "No circle": ("results/words.py", "def late():\n    from rc_probe.results.verdict import LEVELS"),
    "needs no torch": ("reports/table_cells.py", "import torch"),
    "the errors of hooks alone": ("results/words.py", "from rc_probe.hooks.structure import structure"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_the_contract_finds(tree: Path, tmp_path: Path, name: str) -> None:
    """Imports inside functions count, too."""
    shutil.copytree(tree / "rc_probe", tmp_path / "rc_probe")
    place, line = SPOILED[name]
    with (tmp_path / "rc_probe" / place).open("a", encoding="utf-8") as file:
        file.write(f"\n\n{line}\n")
    code, said = contract(tmp_path)
    assert code == 1
    assert re.search(rf"{name}.* BROKEN", said), said


def python_folders() -> Iterator[str]:
    """The packages that the folders are, by the name they have once installed."""
    for package, source in HOMES.items():
        for folder in {path.parent for path in (ROOT / source).rglob("*.py")}:
            inside = folder.relative_to(ROOT / source).parts
            yield ".".join((package, *inside))


def test_no_folder_is_left_out_of_the_package() -> None:
    assert SETUPTOOLS["package-dir"] == HOMES
    assert sorted(SETUPTOOLS["packages"]) == sorted(python_folders())


def test_no_file_is_left_out_of_the_package() -> None:
    """What the code reads besides Python files: each is under `package-data`."""
    held = set()
    for package, patterns in SETUPTOOLS["package-data"].items():
        home = max((name for name in HOMES if f"{package}.".startswith(f"{name}.")), key=len)
        folder = ROOT.joinpath(HOMES[home], *package.removeprefix(home).split(".")[1:])
        held |= {path for pattern in patterns for path in folder.glob(pattern)}
    others = {
        path
        for source in HOMES.values()
        for path in (ROOT / source).rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    assert others <= held
    assert not [path for path in held if "census" in path.parts]


@pytest.mark.parametrize("source", CODE)
def test_folders_and_files_are_small(source: str) -> None:
    files = [path for path in (ROOT / source).rglob("*.py") if "__pycache__" not in path.parts]
    assert files
    for folder in {path.parent for path in files}:
        assert sum(path.parent == folder for path in files) <= MOST_FILES, folder
    long = {
        path.name: count
        for path in files
        if (count := len(path.read_text("utf-8").splitlines())) > MOST_LINES
    }
    assert long == {}


def test_no_test_file_imports_another() -> None:
    for path in TESTS.rglob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) (\S+)", path.read_text("utf-8"), re.MULTILINE)
        assert not [name for name in imported if re.search(r"(^|\.)(test_|conftest)|^tests\b|^\.", name)], (
            path
        )


def test_ci_runs_the_command_of_the_readme() -> None:
    """After the installation, exactly what the README says; and the contract."""
    (line,) = re.findall(
        r'^python3 -m venv .*"\.\[dev\]" && (.+)$', (ROOT / "README.md").read_text("utf-8"), re.MULTILINE
    )
    steps = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    assert line in steps
    assert line == steps[-1], "what the tests said is the end of the log"
    for step in ("ruff check .", "ruff format --check .", "lint-imports", "mypy"):
        assert any(step in line for line in steps), step
