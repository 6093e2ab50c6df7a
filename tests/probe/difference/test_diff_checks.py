"""Conditions on a difference: what they may name, what they look at, and how they end."""

from typing import Any

import pytest

from rc_probe.difference.checks import DiffChecks
from rc_probe.difference.options import DiffOptions
from rc_probe.difference.result import DiffResult
from rc_probe.hooks.errors import RcProbeError
from rc_probe.results.tables import DIFFED


def row(component: str, place: int | None, metric: str, mean: float | None) -> dict[str, Any]:
    at = {"block": None, "layer": place} if component == "stream" else {"block": place, "layer": None}
    return {"component": component, **at, "metric": metric, "mean": mean, "std": None, "count": 8}


def made(*more: dict[str, Any]) -> DiffResult:
    rows = [row("stream", layer, "difference", value) for layer, value in enumerate([0.0, 0.01, 0.08])]
    rows += [row("stream", layer, "difference_bulk", value) for layer, value in enumerate([0.0, 0.02, 0.06])]
    rows += [row("block", n, "sensitivity", value) for n, value in ((1, 0.01), (2, 0.03))]
    rows += [row("block", n, "sensitivity_bulk", value) for n, value in ((1, 0.01), (2, 0.03))]
    rows += [row("mlp", n, "sensitivity_bulk", value) for n, value in ((1, 0.02), (2, 0.025))]
    rows += [row("predictions", None, "agreement", 0.75), row("predictions", None, "change_loss", 0.5)]
    predictions = {"task": "next token", "samples": 8, "predictions": 90, "agreement": {"a": 1.0, "b": 0.75},
                   "loss": {"a": 2.0, "b": 2.5, "low": 0.4, "high": 0.6}}  # fmt: skip
    entry = {"id": "m", "class": "GPT2LMHeadModel", "blocks": 2, "dim": 8}
    return DiffResult(
        {"name": "base", **entry}, {"name": "<tuned>", **entry},
        {"samples": 8, "tokens": 99, "modality": "text", "threshold": 0.05, "notes": ["Something"], "predictions": predictions,
         "command": "rc-probe diff base tuned"},
        {"date": "2026-01-01"}, {"differences": DIFFED["differences"].frame([*rows, *more])},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "passed", "said"),
    [
        ("difference@max>0.05", False, "0.08 at layer 2"),
        ("difference@max>0.1", True, "0.08 at layer 2"),
        ("difference@mean>0.02", False, "0.03 over the layers"),
        ("difference@first>0", True, "0 at layer 0"),
        ("difference_bulk@1:stream>0.05", True, "0.02 at layer 1"),
        ("sensitivity@max>0.02", False, "0.03 at block 2"),
        ("sensitivity@first>0.02", True, "0.01 at block 1"),
        ("sensitivity_bulk@2:mlp>0.02", False, "0.025 at block 2"),
        ("agreement<0.95", False, "0.75"),
        ("change_loss>0.6", True, "0.5"),
        ("cka@min<0.9", None, "cka of stream was not measured"),
    ],
)
def test_conditions(text: str, passed: bool | None, said: str) -> None:
    (outcome,) = DiffChecks.of([text]).evaluate(made())
    assert (outcome.passed, outcome.said) == (passed, said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("diffrence@max>0.05", "Did you mean 'difference'"),
        ("difference>0.05", "where is missing"),
        ("agreement@last<0.9", "it is one number, of no layer"),
        ("difference@max:mlp>0.05", "no difference of 'mlp' is measured. There is stream"),
        ("sensitivity@max:stream>0.05", "There is block, attention"),
        ("agreement<2", "it always holds, for agreement lies in 0 to 1"),
        ("difference@max<0", "it never holds"),
        ("change_loss", "nothing to compare with"),
    ],
)
def test_misspelt_conditions(text: str, said: str) -> None:
    with pytest.raises(RcProbeError, match=said):
        DiffChecks.of([text])


def test_what_is_not_measured_is_refused_before() -> None:
    with pytest.raises(RcProbeError, match=r"norm is not measured\. Add it to --metrics"):
        DiffChecks.of(["change_norm@max>1"]).plan(DiffOptions(metrics=("residual",)))
    with pytest.raises(RcProbeError, match="Leave --no-sensitivity out"):
        DiffChecks.of(["sensitivity@max>1"]).plan(DiffOptions(sensitivity=False))
    for text in ("sensitivity@0>1", "sensitivity@3>1", "difference@3>1"):
        with pytest.raises(RcProbeError, match="there is no"):
            DiffChecks.of([text]).fit(2)
    DiffChecks.of(["difference@0>1", "difference@2>1", "sensitivity@2>1"]).fit(2)


def test_fail_if() -> None:
    assert [outcome.passed for outcome in made().fail_if("difference@max>0.1", "agreement<0.5")] == [True] * 2
    with pytest.raises(AssertionError, match=r"FAIL: agreement<0\.95: 0\.75"):
        made().fail_if(["agreement<0.95"])
    for wrong in (3, [["agreement<0.5"]]):
        with pytest.raises(RcProbeError, match="it is no text"):
            made().fail_if(wrong)
    with pytest.raises(RcProbeError, match="has no number at 3"):
        made(row("block", 3, "sensitivity", None)).fail_if("sensitivity@max>0.5")


def test_what_is_said() -> None:
    """Block 2 has .03² of .03² + .01²: 90 % of the squares."""
    verdict = made().verdict
    assert verdict["sentence"] == "0.060 relative difference of <tuned> from base at the last layer."
    assert (verdict["metric"], verdict["value"], verdict["first"]) == ("difference_bulk", 0.06, 2)
    assert verdict["reasons"] == [
        "The relative difference is first over 0.050 at layer 2: 0.060.",
        "On the same inputs block 2 differs most: 0.030 of the stream behind it (90% of the squares of all blocks).",
        "Of the branches it is the MLP branch of block 2: 0.025 of the stream that it is added to.",
        "<tuned> gives the answer of base in 75.0% of its predictions (next token).",
        "The loss is 2.50 nats, that of base 2.00 (+0.50, 95 % interval +0.40 to +0.60).",
    ]


def test_the_page() -> None:
    """Its sections, figures, numbers and names, the names escaped; the same bytes each time."""
    result = made(*(row("stream", layer, "change_norm", float(layer)) for layer in range(3)))
    page = result.to_html()
    assert page == result.to_html()
    assert "<title>&lt;tuned&gt; beside base" in page and "<tuned>" not in page
    for title in (
        "The streams by layer",
        "Whose doing it is",
        "Their predictions",
        "Changes of the metrics",
        "The models",
    ):
        assert f"<h2>{title}</h2>" in page
    assert "bulk, layer 2: 0.0600" in page
    assert "mlp, block 2: 0.0250" in page
    assert "0.40 to 0.60" in page
    assert "Note: Something" in page
    assert "rc-probe diff base tuned" in page
