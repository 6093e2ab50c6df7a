"""Malformed input, a little of each kind; `python tests/abuse malformed` is the long run."""

from __future__ import annotations

from pathlib import Path

import pytest
from abuse.malformed import Tried, try_checkpoints, try_data, try_grammars, try_results
from support.made_results import make_result


def none(found: list[Tried]) -> None:
    assert not found, "\n\n".join(
        f"{each.kind}: {each.given[-300:]}\n{each.how[-1500:]}" for each in found[:3]
    )


def test_grammars() -> None:
    none(try_grammars(0, 60))


def test_results(tmp_path: Path) -> None:
    none(try_results(0, 25, tmp_path, make_result(blocks=2), pages=False))


@pytest.mark.filterwarnings("ignore")
def test_data(tmp_path: Path) -> None:
    none(try_data(0, 30, tmp_path))


def test_checkpoints(tmp_path: Path) -> None:
    none(try_checkpoints(0, 10, tmp_path))
