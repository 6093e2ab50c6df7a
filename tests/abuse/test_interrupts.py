"""Interrupts at some lines of rc-probe's own, apart alike; `python tests/abuse interrupts` takes every line."""

from pathlib import Path

import pytest
from abuse.interrupts import Scene, prove

TIMES = [
    ("attach", False, 20), ("attach", True, 20), ("ablate", False, 20), ("ablate", True, 20), ("watch", False, 20),
    ("watch", True, 10), ("probe", False, 30), ("probe", True, 10),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "anew", "times"), TIMES)
def test_all_is_as_before_after_an_interrupt(name: str, anew: bool, times: int, tmp_path: Path) -> None:
    assert prove(Scene(tmp_path), name, times=times, anew=anew) == times
