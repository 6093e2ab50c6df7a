"""What is said and shown of importance: sentences, rank correlations and the heat map, of a table made by hand."""

import re
from typing import Any

import pytest
from support.made_results import make_result

from rc_probe.result import ProbeResult

COSTS = [3.1, 0.02, 0.3, 2.0, 0.05, 0.1]  # in nats, by block
INFLUENCES = [0.5, 0.02, 0.07, 0.01, 0.04, 0.06]


def row(
    component: str,
    block: int,
    metric: str,
    value: float,
    change: float | None = None,
    head: int | None = None,
) -> dict[str, Any]:
    baseline = None if change is None else value - change
    ends = (None, None) if change is None else (change - 0.01, change + 0.01)
    return {"component": component, "block": block, "head": head, "metric": metric, "value": value, "baseline": baseline,
            "change": change, "low": ends[0], "high": ends[1], "count": 16}  # fmt: skip


def made(*more: dict[str, Any]) -> ProbeResult:
    result = make_result(blocks=6, importance={"task": "next token", "samples": 16})
    rows = [row("block", n, "loss", 3.5 + cost, cost) for n, cost in enumerate(COSTS, 1)]
    rows += [row("block", n, "proxy_block_influence", value) for n, value in enumerate(INFLUENCES, 1)]
    result.tables["importance"] = result.declared["importance"].frame([*rows, *more])
    return result


def test_the_sentence_and_what_a_proxy_does_not_see() -> None:
    """Ranks by cost 1 4 3 2 5 6 against by influence 1 3 6 5 2 4 (of blocks 1, 4, 3, 6, 5, 2): ρ = 1 − 6·22/(6·35)."""
    found = made().verdict["importance"]
    assert (
        found["sentence"]
        == "Without block 2 the loss rises by 0.020 nats, without block 1 it rises by 3.1 nats."
    )
    alone, ranked, unseen = found["reasons"]
    assert alone == "Each is removed alone: what several cost together is not the sum of these."
    ranks = {"cost": [6, 1, 4, 5, 2, 3], "influence": [6, 2, 5, 1, 3, 4]}
    squares = sum((a - b) ** 2 for a, b in zip(ranks["cost"], ranks["influence"], strict=True))
    assert (
        ranked
        == f"Rank correlation of proxies with what removals cost: block influence of blocks {1 - 6 * squares / 210:.2f}."
    )
    assert unseen == (
        "Block influence does not see block 4: 0.010, number 6 of 6; by what its removal costs (+2.0 nats) it is number 2."
    )


def test_heads_are_named_and_their_credit_is_not() -> None:
    reasons = made(
        row("head", 3, "loss", 4.5, 1.0, head=2), row("head", 3, "loss", 3.4, -0.1, head=1)
    ).verdict["importance"]["reasons"]
    assert "Of 2 parts of blocks, head@3:2 costs most: the loss rises by 1.0 nats." in reasons
    assert (
        "The credit of a single head is not identifiable once the output projection has mixed them."
        in reasons
    )


def test_where_nothing_was_removed_nothing_is_said() -> None:
    assert (
        "importance" not in make_result(blocks=2).verdict
        or make_result(blocks=2).verdict["importance"] is None
    )
    assert "What holds the model up" not in make_result(blocks=2, deep=False, paths=False).to_html()


def test_the_section_has_the_second_figure_and_every_number() -> None:
    result = made(
        row("mlp", 2, "loss", 3.4, -0.1),
        row("mlp", 5, "loss", 3.6, 0.1),
        row("mlp", 2, "proxy_branch_norm", 0.25),
    )
    text = result.to_html()
    assert re.findall(r'<figure id="figure-([^"]+)', text)[1] == "importance"
    start = text.index("<h2>What holds the model up</h2>")
    own = text[start : text.index("</section>", start)]
    assert "scored by its own task (next token) on 16 samples" in own
    assert "<title>block, block 4: +2.00 nats</title>" in own
    assert (
        "<title>mlp, block 2: −0.100 nats</title>" in own
        and "<title>mlp, block 5: +0.100 nats</title>" in own
    )
    assert own.count("<title>") == 12
    assert '<td data-value="2">2.00 (1.99 to 2.01)</td>' in own
    assert '<td data-value="0.25">0.250</td>' in own
    assert "rank correlation" in own


@pytest.mark.usefixtures("no_figures")
def test_one_block_is_told_by_itself() -> None:
    result = make_result(blocks=1)
    result.tables["importance"] = result.declared["importance"].frame([row("block", 1, "kl", 0.5, 0.5)])
    assert (
        result.verdict["importance"]["sentence"]
        == "Without block 1 the KL divergence from the whole model rises by 0.50 nats."
    )


def test_what_costs_most_stands_out_from_a_light_and_from_a_dark_page() -> None:
    """Each colour of the map is the page's own, and the last one is furthest from the page in both."""
    text = made().to_html()
    found = {int(n) for n in re.findall(r'fill="var\(--h(\d+),#[0-9a-f]{6}\)"', text)}
    assert {1, 12} <= found <= set(range(1, 13))
    light, dark = (
        [
            int(one[1:3], 16) + int(one[3:5], 16) + int(one[5:7], 16)
            for one in re.findall(r"--h\d+: (#[0-9a-f]{6});", part)
        ]
        for part in text.split("prefers-color-scheme: dark")[:2]
    )
    assert len(light) == len(dark) == 12
    assert light == sorted(light, reverse=True) and dark == sorted(dark), "on white darker, on black lighter"
