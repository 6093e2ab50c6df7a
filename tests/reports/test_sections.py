"""Sections: the page loops over the tuple, hands each a view, and leaves out what has nothing to show."""

import re

import pandas as pd
import pytest
from support.made_results import make_result

from rc_probe.reports import sections
from rc_probe.reports.pages import run as page
from rc_probe.reports.sections.section import Folded, Shown
from rc_probe.reports.sections.view import View
from rc_probe.reports.table_cells import Cell, Table
from rc_probe.results.curves import curves, curves_by_metric


class Scratch:
    """Says how many tokens were measured, where there are any."""

    measurement, title = "scratch", "How <many> tokens"

    def show(self, view: View, /) -> Shown | None:
        if not view.result.settings["tokens"]:
            return None
        table = Table("scratch", "Tokens", ["what", "tokens"], [[Cell("all"), Cell("4,096", "4096")]])
        return Shown(
            lead="A lead.",
            finding=f"{view.result.settings['tokens']} tokens & more.",
            reasons=["One reason."],
            after=["An afterthought."],
            folded=Folded.of("The numbers", table, None),
        )


@pytest.mark.usefixtures("no_figures")
def test_a_section_in_the_tuple_is_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "SECTIONS", (Scratch(), *sections.SECTIONS))
    result = make_result(blocks=2)
    text = result.to_html()
    start = text.index("<h2>How &lt;many&gt; tokens</h2>")
    own = text[start : text.index("</section>", start)]
    wanted = (
        "<p>A lead.</p>", '<p class="finding">4096 tokens &amp; more.</p>', "<p>One reason.</p>", "<p>An afterthought.</p>",
        "<summary>The numbers</summary>", 'id="table-scratch"', '<td data-value="4096">4,096</td>',
    )  # fmt: skip
    places = [own.index(each) for each in wanted]
    assert places == sorted(places)
    result.settings["tokens"] = 0
    assert "How &lt;many&gt; tokens" not in result.to_html()


@pytest.mark.usefixtures("no_figures")
def test_what_a_measurement_says_of_the_model_is_no_fact_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    result = make_result(blocks=2, scratch={"inner": 3})
    assert "<dt>scratch</dt>" in result.to_html()
    monkeypatch.setattr(page, "SECTIONS", (Scratch(),))
    assert "<dt>scratch</dt>" not in result.to_html()


def test_each_section_belongs_to_a_measurement() -> None:
    of = {type(section).__name__: section.measurement for section in sections.SECTIONS}
    assert of == {
        "Embeddings": "embeddings",
        "Residual": "curves", "Ablations": "ablations", "Paths": "paths", "Chains": "chains",
        "BelowFloatFloor": "floor", "OtherMetrics": "curves", "MassiveTokens": "massive",
        "OwnAttention": "attention",
        "Importance": "importance", "Drops": "drops", "WhatIf": "what_if",
        "Streams": "streams",
        "HeadRanks": "heads", "Truncation": "truncation",
    }  # fmt: skip


def test_a_table_that_was_not_measured_has_its_columns() -> None:
    result = make_result(blocks=2, paths=False)
    view = View(result)
    assert view.table("chains").empty
    assert list(view.table("chains")) == ["length", "metric", "mean", "std", "median", "low", "high", "count"]
    assert view.whole("chains") is None and view.found("paths") == {}
    result.tables["chains"] = pd.DataFrame({"length": [1], "metric": ["rank_one"], "mean": [0.5]})
    assert view.table("chains")["median"].isna().all()
    assert list(map(str, view.whole("chains").headings)) == ["length", "metric", "mean"]


@pytest.mark.usefixtures("no_figures")
def test_curves_are_derived_once_for_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    from rc_probe.reports.sections import view

    seen = []
    monkeypatch.setattr(view, "curves_by_metric", lambda result: seen.append(1) or curves_by_metric(result))
    make_result(blocks=2).to_html()
    assert len(seen) == 1


def test_each_panel_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn = []
    plain = Axes.draw
    monkeypatch.setattr(Axes, "draw", lambda self, renderer: drawn.append(self) or plain(self, renderer))
    text = make_result(blocks=2, ablations=["mlp@7"]).to_html()
    assert len(drawn) == len(set(map(id, drawn))) == text.count('<div class="panel">') == 21


def test_curves_keep_the_order_of_the_table_and_go_by_layer() -> None:
    result = make_result(blocks=2, init=False, metrics=["residual", "norm"])
    table = result.tables["residuals"]
    shuffled = table[table["variant"] != "SAN"].iloc[::-1].reset_index(drop=True)
    shuffled.loc[(shuffled["layer"] == 1) & (shuffled["variant"] == "SAN+MLP"), "mean"] = float("nan")
    shuffled.loc[(shuffled["metric"] == "residual") & (shuffled["variant"] == "SAN+skip"), "mean"] = float(
        "nan"
    )
    result.tables["residuals"] = shuffled
    found = curves_by_metric(result)
    assert list(found) == ["norm", "residual"] and found["norm"] == curves(result, "norm")
    assert [variant for _, variant in found["norm"]] == ["transformer", "SAN+skip", "SAN+MLP"]
    assert [variant for _, variant in found["residual"]] == ["transformer", "SAN+MLP"]
    assert found["norm"]["pretrained", "transformer"].layers == [0, 1, 2]
    assert found["norm"]["pretrained", "SAN+MLP"].layers == [0, 2]
    row = table.query("variant == 'transformer' and metric == 'norm' and layer == 2").iloc[0]
    curve = found["norm"]["pretrained", "transformer"]
    assert (curve.means[2], curve.stds[2], curve.floors[2]) == (row["mean"], row["std"], row["floor"])


def test_paths_and_chains_stand_apart() -> None:
    text = make_result(blocks=2).to_html()
    titles = re.findall("<h2>(.*?)</h2>", text)
    place = titles.index("Which paths do the work?")
    assert titles[place + 1] == "Attention chained along paths"
    start = text.index("<h2>Attention chained")
    chains = text[start : text.index("</section>", start)]
    assert 'id="figure-chains"' in chains and 'id="table-paths-chains"' in chains
