"""Interrupts at some lines of rc-probe's own, apart alike; `python tests/abuse interrupts` takes every line."""

from pathlib import Path

import pytest
from abuse.interrupts import Scene, prove

TIMES = [
    ("attach", False, 40), ("attach", True, 40), ("ablate", False, 40), ("ablate", True, 40), ("watch", False, 40),
    ("watch", True, 20), ("probe", False, 60), ("probe", True, 20),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "anew", "times"), TIMES)
def test_all_is_as_before_after_an_interrupt(name: str, anew: bool, times: int, tmp_path: Path) -> None:
    assert prove(Scene(tmp_path), name, times=times, anew=anew) == times
