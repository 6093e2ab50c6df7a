"""What is said and shown of removals one after the other, of a table made by hand."""

from typing import Any

import pytest
from support.made_results import make_result

from rc_probe.result import ProbeResult
from rc_probe.results.findings.drop_words import listed

CHOSEN = {"greedy": (0.01, 0.05), "angular": (0.02, 0.3), "random": (0.4, 1.6)}


def made(**facts: Any) -> ProbeResult:
    """Two removals by each method; on samples held out each costs 0.02 nats more."""
    known = {
        "task": "next token", "criterion": "loss", "samples": {"chosen": 8, "held_out": 8}, "parts": ["block"],
        "removed": 2, "method": "greedy", "draw": None, "ablate": "block@3,5",
        "list": [{"component": "block", "block": 5}, {"component": "block", "block": 3}],
        "from_1": {"block": [3, 5]}, "from_0": {"block": [2, 4]}, "forms": {"llama.cpp": "prune <2,4>", "mergekit": "slices:\n  - all\n"},
    }  # fmt: skip
    result = make_result(blocks=6, drops=known | facts)
    rows = [
        {"method": method, "draw": draw, "split": split, "step": step, "component": "block", "block": (5, 3)[step - 1],
         "metric": "loss", "value": 3 + cost, "baseline": 3.0, "change": cost, "low": cost - 0.01, "high": cost + 0.01, "count": 8}
        for method, draw in (("greedy", None), ("angular", None), ("random", 1), ("random", 2))
        for split, more in (("chosen", 0.0), ("held_out", 0.02))
        for step, cost in ((n, CHOSEN[method][n - 1] + more + 0.2 * (draw == 2)) for n in (1, 2))
    ]  # fmt: skip
    result.tables["drops"] = result.declared["drops"].frame(rows)
    return result


def test_the_list_and_both_costs_are_told() -> None:
    found = made().verdict["drops"]
    assert found["sentence"] == (
        "Without blocks 3 and 5 the loss changes by +0.070 nats on samples that did not choose (+0.050 nats on those that did)."
    )
    assert found["reasons"][0] == (
        "On samples held out: removal one by one +0.070 nats (where chosen +0.050); the window of least angular distance +0.32 "
        "nats (where chosen +0.30); random orders (mean) +1.7 nats (where chosen +1.7). The list is that of removal one by one, "
        "which costs least where it was chosen."
    )
    assert "model.drops.forms: llama.cpp and mergekit" in found["reasons"][1]
    refused = made(refused="its blocks share their weights").verdict["drops"]["reasons"]
    assert refused[1] == "No smaller model is written: its blocks share their weights."


def test_parts_are_listed() -> None:
    parts = [("mlp", 4), ("attention", 7), ("attention", 2)]
    given = [{"component": component, "block": block} for component, block in parts]
    assert listed(given) == "the MLP branch of block 4, and the attention branches of blocks 2 and 7"


def test_the_section_has_curves_lists_and_numbers() -> None:
    text = made().to_html()
    start = text.index("<h2>What can go</h2>")
    own = text[start : text.index("</section>", start)]
    assert (
        "<p>Parts are removed one after the other; 8 samples choose, the other 8 say what that costs.</p>"
        in own
    )
    assert "<title>removal one by one, 2 removed: 0.0700 nats</title>" in own
    assert "<title>a random order, 1 removed: 0.500 nats</title>" in own  # the mean of .4 and .6
    assert "prune &lt;2,4&gt;" in own and "slices" not in own  # lines would run together
    assert ">2, 4<" in own and ">3, 5<" in own
    assert '<td data-value="0.32">0.320 (0.310 to 0.330)</td>' in own


@pytest.mark.usefixtures("no_figures")
def test_without_removals_there_is_no_section() -> None:
    assert "What can go" not in make_result(blocks=2).to_html()
