"""What is said and shown of embeddings, of tables made by hand."""

import re
from typing import Any

import pytest
from support.made_results import make_result

from rc_probe.comparison import Comparison
from rc_probe.result import ProbeResult
from rc_probe.results.protocols import Run

BEST = {
    "metric": "accuracy",
    "layer": 1,
    "chosen": 0.9,
    "value": 0.8,
    "own": 0.7,
    "low": -0.05,
    "high": 0.25,
    "count": 10,
}


def row(layer: int, metric: str, value: float, **more: float) -> dict[str, Any]:
    ends = {"std": None, "low": None, "high": None, "most": None}
    return {"layer": layer, "metric": metric, "value": value, **ends, "count": 20} | more


def made(best: dict[str, Any] | None, *, isoscore: bool = True) -> ProbeResult:
    facts = {"samples": 20, "things": "texts", "pooling": ["mean"], "best": best}
    result = make_result(blocks=2, paths=False, embeddings=facts)
    rows = [
        each
        for layer in range(3)
        for each in (
            row(layer, "embedding_cosine", 0.3 + layer / 10, std=0.1, low=0.4, high=0.6),
            row(layer, "embedding_cosine_far", 0.65),
            *(
                [row(layer, "first_component", 0.25), row(layer, "isoscore", 0.125, most=0.4)]
                if isoscore
                else []
            ),
            row(layer, "rankme", 7.5, most=16.0),
            row(layer, "accuracy", 0.75, low=0.5, high=0.9),
        )
    ]
    result.tables["embeddings"] = result.declared["embeddings"].frame(rows)
    bins = [{"low": 0.4, "high": 0.42, "pairs": 30}, {"low": 0.42, "high": 0.44, "pairs": 0}, {"low": 0.44, "high": 0.46, "pairs": 160}]  # fmt: skip
    result.tables["embedding_cosines"] = result.declared["embedding_cosines"].frame(bins)
    return result


def test_the_floor_the_directions_and_the_best_layer_are_said() -> None:
    said = made(BEST).verdict["embeddings"]
    assert said["sentence"] == (
        "The cosine of two different texts is 0.50 on average (standard deviation 0.10, 95 % of pairs are below 0.65): "
        "a similarity says something only as far as it is above that."
    )
    directions, whole, better = said["reasons"]
    assert directions == (
        "Directions in use, of 20 texts: IsoScore 0.12 (at most 0.40), RankMe 7.50 (at most 16); the first principal "
        "component has 25 % of the variance."
    )
    assert whole == "Retrieval accuracy by the model’s own embedding: 0.75."
    assert better == (
        "Best on the texts that chose: layer 1 (0.90). On 10 others: 0.80, by the model’s own embedding 0.70 (change "
        "+0.10, −0.050 to +0.25, which so few cannot tell from none)."
    )  # fmt: skip


@pytest.mark.parametrize(
    ("best", "says"),
    [
        (BEST | {"layer": 2}, "No other layer is better on the texts that chose."),
        (None, "Too few texts to choose"),
    ],
)
def test_no_layer_is_named_where_none_is_better_or_it_is_not_known(best: Any, says: str) -> None:
    assert made(best).verdict["embeddings"]["reasons"][-1].startswith(says)


def test_embeddings_that_are_all_the_same_are_said_to_be() -> None:
    assert (
        "The embeddings of all texts are the same up to rounding: RankMe 7.50 (at most 16)."
        in made(None, isoscore=False).verdict["embeddings"]["reasons"]
    )


def test_the_section_has_every_number() -> None:
    text = made(BEST).to_html()
    assert "One vector for each of 20 texts" in text
    assert (
        "<title>0.44 to 0.46: 160 pairs</title>" in text and "30 pairs" in text and "0 pairs</title>" in text
    )
    assert "Retrieval accuracy by layer" in text and "IsoScore that so many samples can reach" in text
    assert re.search(r'<td data-value="0.5">0.500 \(0.400 to 0.600\)</td>', text)
    assert "Embeddings of whole samples" not in make_result(blocks=2, paths=False).to_html()


@pytest.mark.usefixtures("no_figures")
def test_runs_are_compared_by_their_own_embedding() -> None:
    runs = [Run("one", made(BEST)), Run("other", made(None))]
    comparison = Comparison(runs)
    table = comparison.tables["embeddings"]
    assert set(table["run"]) == {"one", "other"} and len(table) == 36
    text = comparison.to_html()
    assert "best layer, on the samples that chose" in text
    assert '<td data-value="0.125">0.125</td>' in text
