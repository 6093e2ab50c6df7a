"""What the report shows of massive tokens: a section, the paper's residual beside that of the bulk, no panel twice."""

import pandas as pd
import pytest
from support.made_results import make_result, with_bulk

from rc_probe.result import ProbeResult
from rc_probe.results.words import number

KEY = "all tokens (the paper’s residual)"


def made(*, massive: bool) -> ProbeResult:
    return with_bulk(make_result(blocks=6, paths=False, deep=False), massive=massive)


@pytest.fixture(scope="module")
def result() -> ProbeResult:
    return made(massive=True)


@pytest.fixture(scope="module")
def page(result: ProbeResult) -> str:
    return result.to_html()


@pytest.fixture(scope="module")
def plain() -> str:
    return made(massive=False).to_html()


def section(page: str, title: str) -> str:
    start = page.index(f"<h2>{title}</h2>")
    return page[start : page.index("</section>", start)]


def test_the_section_says_which_where_and_how_many(page: str) -> None:
    own = section(page, "Massive tokens")
    wanted = (
        "The bulk is all other tokens. It excludes at most 1.6 % of the tokens (layer 3, metric massive_share).",
        "position 1 (“[CLS]”) in 32 of 32 texts, layers 3 to 5, up to 160 times",
        "no defect.", 'id="figure-massive"', ">position 1 (“[CLS]”), layer 4: 160 times the median<",
        ">position 9 (“The”), layer 4: 6.00 times the median<", ">Pretrained, layer 3: 0.0156 ± 0<", "<summary>The numbers",
        'id="table-massive"', 'id="table-massive_levels"',
    )  # fmt: skip
    for each in wanted:
        assert each in own, each
    rows = own[own.index('id="table-massive"') :].partition("</table>")[0]
    assert rows.count("<tr>") == 1 + 4 and '<td data-value="160">160</td>' in rows
    assert page.index("<h2>Relative residual") < page.index("<h2>Massive tokens")


def test_gaps_between_layers_are_gaps() -> None:
    """A line joins layers next to each other; a token that is massive again later has a second line."""
    from rc_probe.reports.figures.massive import by_layer_of, massive_figure

    rows = pd.DataFrame({
        "layer": [1, 2, 2, 5, 6], "position": 1, "token": "x", "samples": [1, 3, 1, 1, 1],
        "norm_over_median": [8.0, 10.0, 20.0, 9.0, 7.0],
    })  # fmt: skip
    assert by_layer_of(rows) == {1: 8, 2: 12.5, 5: 9, 6: 7}
    assert massive_figure([], {}, 6) is None
    whole = massive_figure([("position 1", rows)], {}, 6)
    joined = massive_figure([("position 1", rows.assign(layer=[1, 2, 2, 3, 4]))], {}, 6)
    assert whole and joined
    lines = [figure.panels[0].count('fill="none"') for figure in (whole, joined)]
    assert len(whole.panels) == 1 and lines[0] - lines[1] == 1


def test_a_long_table_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch, result: ProbeResult) -> None:
    from rc_probe.reports.sections import massive
    from rc_probe.reports.sections.view import View

    monkeypatch.setattr(massive, "MOST_ROWS", 2)
    shown = massive.MassiveTokens().show(View(result))
    assert shown is not None
    table = shown.folded[0].tables[0]
    assert [row[4].text for row in table.rows] == ["12.0", "160"]  # the largest, by layer
    assert table.caption.endswith("the 2 largest of 4 rows, all are in massive.csv")


def test_the_papers_residual_stands_beside(page: str, result: ProbeResult) -> None:
    own = section(page, "Relative residual by layer")
    assert "<h3>Relative residual of the bulk by layer</h3>" in own and f"> {KEY}</li>" in own
    assert "Drawn is the bulk: all tokens but massive ones, of over 5 times" in own
    assert "The thin line is the whole model with all tokens" in own
    row = result.tables["residuals"].query(
        "weights == 'pretrained' and variant == 'transformer' and layer == 4 and metric == 'residual'"
    )
    assert f">{KEY}, layer 4: {number(row['mean'].item(), 3)} ±" in own
    assert own.count(f">{KEY}, layer 4:") == 2, "linear and log, of the pretrained weights alone"
    assert own.count("<th scope=") - own.count("colspan") == 1 + 4 + 1 + 4
    assert ">transformer, all tokens</th>" in own


def test_without_massive_tokens_nothing_is_said_twice(plain: str) -> None:
    assert "<h2>Massive tokens" not in plain and KEY not in plain and "all tokens</th>" not in plain
    own = section(plain, "Relative residual by layer")
    assert "<h3>" not in own and "No token is massive: the bulk is all tokens, and this is" in own
    others = section(plain, "Other metrics by layer")
    assert others.count('<div class="panel">') == 7 == others.count('id="table-by-layer-')
    said = "No token is massive: each metric of the bulk is that of all tokens, and is shown once."
    assert plain.count(said) == 1
    assert "of the bulk</text>" not in others and "Share of massive" not in others


def test_what_is_equal_is_shown_once(page: str, plain: str) -> None:
    """Here the residual alone is another: it has a panel of all tokens; the share is drawn above."""
    others = section(page, "Other metrics by layer")
    assert others.count('<div class="panel">') == 8
    assert ">Relative residual</text>" in others and ">Relative residual</text>" not in plain
    assert (
        "of the bulk is that of all tokens, and is shown once: Token cosine of the bulk, Effective" in others
    )
    assert others.count('id="table-by-layer-') == 9 and 'id="table-by-layer-massive_share"' in others


def test_a_metric_of_the_bulk_that_differs_has_its_panel() -> None:
    result = made(massive=True)
    rows = result.tables["residuals"]
    rows.loc[(rows["metric"] == "cosine_bulk") & (rows["layer"] == 2), "mean"] += 0.01
    others = section(result.to_html(), "Other metrics by layer")
    assert ">Token cosine of the bulk</text>" in others
    assert "shown once: Effective rank of the bulk, Stable rank of the bulk." in others


def test_without_a_metric_of_the_bulk_all_is_as_before() -> None:
    text = make_result(blocks=2, paths=False, deep=False).to_html()
    assert "bulk" not in section(text, "Relative residual by layer") + section(text, "Other metrics by layer")
