"""The README says what the code does, where the two could drift apart."""

import re

import pytest
import torch
from support.places import ROOT

from rc_probe.hooks.structure.structure import KIND_LETTER
from rc_probe.metrics.stream_metrics import measure
from rc_probe.registry import METRICS

README = (ROOT / "README.md").read_text("utf-8")


def test_the_letters_of_a_signature_are_told() -> None:
    told = set(re.findall(r"`([A-Za-z|+])` ", README))
    assert told == {*KIND_LETTER.values(), "n", "|", "+"}


def test_every_metric_has_a_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert set(METRICS) - set(rows) == {"residual_argmin_low"}, "told beside residual_argmin"


@pytest.mark.parametrize("name", ["effective_rank", "stable_rank"])
def test_ranks_of_a_zero_stream(name: str) -> None:
    assert re.search(rf"^\| `{name}` .* ≥ 1; 0 for an all-zero stream \|", README, re.MULTILINE)
    values, _ = measure(torch.zeros(1, 4, 3), None, [name])[name]
    assert values.tolist() == [0.0]
    assert METRICS[name].low == 0
