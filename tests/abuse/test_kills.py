"""Some kills; `python tests/abuse kills` takes 400, and 200 double writers."""

import os
from pathlib import Path

import pytest
from abuse.kills import SCENES, killed_at_every_step, killed_at_random

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # fork in a process with threads
]


@pytest.mark.parametrize("scene", SCENES)
def test_a_command_that_is_killed_while_it_saves(scene: str, tmp_path: Path) -> None:
    stride = 9 if scene in ("run", "compare") else 45
    assert killed_at_every_step(scene, tmp_path, stride) >= 2


def test_a_command_that_is_killed_at_any_moment(tmp_path: Path) -> None:
    killed_at_random("sweep", tmp_path, 2)
