"""Interrupts at some lines of rc-probe's own; `python tests/abuse interrupts` takes every line."""

import pytest
from abuse.interrupts import Scene, prove

STRIDES = [
    ("attach", False, 211), ("attach", True, 3001), ("ablate", False, 283), ("ablate", True, 3001),
    ("watch", False, 4001), ("probe", False, 40009),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "anew", "stride"), STRIDES)
def test_all_is_as_before_after_an_interrupt(name: str, anew: bool, stride: int) -> None:
    assert len(list(prove(Scene(), name, stride=stride, anew=anew, first=stride // 2))) >= 8
