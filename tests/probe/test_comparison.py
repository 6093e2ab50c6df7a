"""Several results side by side: names, tables, what differs, and the page."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.made_results import PRETRAINED, make_result
from support.pages import fills

import rc_probe
from rc_probe.cli.app import main
from rc_probe.comparison import Comparison, Failure, Run, compare
from rc_probe.hooks.errors import RcProbeError
from rc_probe.reports.figures import comparison as drawing
from rc_probe.reports.figures.comparison import DASHES, styles_of
from rc_probe.reports.pages.comparison import headline
from rc_probe.result import ProbeResult


def curve_of(result: ProbeResult, metric: str = "residual") -> list[float]:
    table = result.tables["residuals"]
    rows = table[
        table["weights"].eq("pretrained") & table["variant"].eq("transformer") & table["metric"].eq(metric)
    ]
    return rows.sort_values("layer")["mean"].tolist()


def weaker(factor: float = 0.8, **options: Any) -> ProbeResult:
    return make_result(pretrained=dict(PRETRAINED) | {"transformer": (0.84, factor)}, **options)


@pytest.fixture(scope="module")
def two() -> Comparison:
    """BERT of 12 layers, and a shallower model of 6 that falls faster."""
    return compare(
        make_result(ablations=["mlp@7", "mlp.skip"], deep=False, init=False),
        weaker(blocks=6, ablations=["mlp@7"], id="org/small", deep=False, init=False),
    )


def training(steps: list[int], **options: Any) -> Comparison:
    runs = [
        Run(
            f"step{step}",
            weaker(0.99 - 0.02 * i, blocks=4, deep=False, init=False, metrics=["residual"]),
            step,
        )
        for i, step in enumerate(steps)
    ]
    return Comparison(runs, title="over training", **options)


# ---- tables


def test_key_numbers_are_those_of_the_runs(two: Comparison) -> None:
    rows = two.tables["runs"].set_index("run")
    for run in two.runs:
        values = curve_of(run.result)
        assert rows["first"][run.name] == values[0]
        assert rows["last"][run.name] == values[-1]
        assert rows["lowest"][run.name] == min(values[1:])
        assert rows["lowest_layer"][run.name] == values.index(min(values[1:]))
        assert rows["level"][run.name] == run.result.verdict["level"]
    assert rows.index.tolist() == ["bert-base-cased", "small"]
    assert "step" not in rows


def test_residuals_are_stacked_with_their_relative_depth(two: Comparison) -> None:
    stacked = two.tables["residuals"]
    assert len(stacked) == sum(len(run.result.tables["residuals"]) for run in two.runs)
    for run, blocks in zip(two.runs, (12, 6), strict=True):
        rows = stacked[stacked["run"] == run.name]
        assert (rows["depth"] * blocks).round(9).tolist() == rows["layer"].tolist()


def test_only_common_ablations_stand_beside_each_other(two: Comparison) -> None:
    wide = two.common_ablations()
    assert list(wide) == ["SAN", "SAN+MLP", "SAN+skip", "mlp@7"]
    for run in two.runs:
        table = run.result.tables["ablations"]
        row = table[table["component"].eq("mlp") & table["metric"].eq("residual")]
        assert wide.loc[run.name, "mlp@7"] == row["value"].item()


def test_a_run_without_the_residual_has_no_numbers() -> None:
    bare = make_result(metrics=["cosine"], deep=False, init=False, id="bare")
    made = compare(make_result(blocks=3, deep=False, init=False), bare)
    rows = made.tables["runs"].set_index("run")
    assert rows.loc["bare", ["first", "last", "lowest", "level"]].isna().all()
    assert "0.8" in headline(made)[0] and "highest" not in headline(made)[0]
    made.to_html()
    nothing = compare(bare, make_result(metrics=["cosine"], deep=False, init=False, id="too"))
    assert headline(nothing) == ("No relative residual of a whole model was measured.", [])
    nothing.to_html()


def by_hand() -> Comparison:
    """Three runs of two layers whose numbers can be read here; the third is deeper."""
    runs = []
    for name, norms, residuals in (
        ("float", [4.0, 6.0, 8.0], [0.75, 0.5, 0.625]),
        ("int8", [4.0, 6.5, 7.0], [0.75, 0.375, 0.5]),
    ):
        result = make_result(
            blocks=2, deep=False, init=False, paths=False, metrics=["residual", "norm"], id=name
        )
        table = result.tables["residuals"]
        whole = table["variant"] == "transformer"
        for metric, values in (("norm", norms), ("residual", residuals)):
            table.loc[whole & (table["metric"] == metric), "mean"] = values
        table["floor"] = 0.0625
        runs.append(result)
    return compare(*runs, weaker(blocks=3, deep=False, init=False, paths=False, id="deeper"))


@pytest.mark.usefixtures("no_figures")
def test_changes_are_against_the_first_run() -> None:
    made = by_hand()
    rows = made.tables["runs"].set_index("run")
    assert rows.loc["int8", ["first_change", "last_change", "lowest_change"]].tolist() == [
        0.0,
        -0.125,
        -0.125,
    ]
    assert rows.loc["float", ["first_change", "last_change", "lowest_change"]].isna().all(), (
        "nothing before it"
    )
    assert rows.loc["deeper", "last_change"] == rows.loc["deeper", "last"] - 0.625
    changes = made.tables["changes"]
    assert changes["run"].unique().tolist() == ["int8"], "the third is deeper than the first"
    norm = changes[changes["metric"] == "norm"]
    assert norm["layer"].tolist() == [0, 1, 2] and norm["change"].tolist() == [0.0, 0.5, -1.0]
    assert norm["value"].tolist() == [4.0, 6.5, 7.0] and norm["baseline"].tolist() == [4.0, 6.0, 8.0]
    assert set(changes["floor"]) == {0.125}, "the noise of both"
    page = made.to_html()
    (table,) = re.findall(r'<table class="sortable" id="table-changes">(.*?)</table>', page, re.DOTALL)
    values = re.findall(r'data-value="([^"]*)"', table)
    assert values == ["0.625", "0.5", "-0.125", "-0.125", "1", "8", "7", "-1", "-1", "2"]
    assert "changes" not in training([0, 10]).tables


@pytest.mark.figures("comparison")
@pytest.mark.usefixtures("no_figures")
def test_changes_are_drawn_and_hollow_within_noise() -> None:
    page = by_hand().to_html()
    start = page.index('id="figure-changes"')
    figure = page[start : page.index("</figure>", start)]
    residual, norm = (
        fills(ET.fromstring(svg)) for svg in re.findall(r"<svg viewBox.*?</svg>", figure, re.DOTALL)[-2:]
    )
    ground = "var(--panel,#ffffff)"
    assert sorted(residual) == [
        ("int8, layer 0: 0", ground), ("int8, layer 1: −0.125", ground), ("int8, layer 2: −0.125", ground),
    ]  # fmt: skip
    colour = "var(--san,#c8500a)"  # of the second run
    assert sorted(norm) == [
        ("int8, layer 0: 0", ground), ("int8, layer 1: 0.500", colour), ("int8, layer 2: −1.00", colour),
    ]  # fmt: skip


def test_a_healthy_half_is_not_black_on_the_map() -> None:
    """The colours are those of 0 to 1, whatever range the runs have."""
    figure = drawing._map_figure([0, 10], pd.DataFrame([[0.51, 1.4], [0.52, 0.53]]))
    cells = fills(ET.fromstring(figure.panels[0]))
    assert {title.partition(": ")[2]: colour.split(",")[0] for title, colour in cells} == {
        "0.510": "var(--h7", "0.520": "var(--h7", "0.530": "var(--h7", "1.40": "var(--h3",
    }  # fmt: skip


@pytest.mark.usefixtures("no_figures")
def test_the_page_of_a_comparison_has_levels_in_colour_and_no_score() -> None:
    made = by_hand()
    made = Comparison(made.runs, [Failure("lost", "no such file")])
    page = made.to_html()
    assert '<td class="level healthy">healthy</td>' in page
    assert 'class="number"' not in page and "residual at the last layer" in page
    (table,) = re.findall(r'<table class="sortable" id="table-failures">(.*?)</table>', page, re.DOTALL)
    assert re.findall(r"<th[^>]*><span[^>]*>([^<]*)</span>", table) == ["run", "why"]
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles == ["Changes from the first run", "Key numbers", "With parts off", "Not measured", "Data"]
    assert "SAN (self-attention network)" in page[page.index("<h2>With parts off") :]


# ---- names


@pytest.mark.usefixtures("no_figures")
def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    def saved(place: str, dtype: str = "float32", **model: Any) -> Path:
        result = make_result(blocks=2, deep=False, init=False, metrics=["residual"], **model)
        result.settings["dtype"] = dtype
        return result.save(tmp_path / place)

    a, b = saved("a"), saved("b")
    other, half = saved("c", revision="0123456789abcdef"), saved("d", "bfloat16")

    def names(*places: Path) -> list[str]:
        return [run.name for run in compare(*places).runs]

    assert names(a, other) == ["bert-base-cased (cd5ef92a9fb2)", "bert-base-cased (0123456789ab)"]
    assert names(a, half) == ["bert-base-cased (float32)", "bert-base-cased (bfloat16)"]
    assert names(a, b) == ["bert-base-cased (a)", "bert-base-cased (b)"]
    assert names(a, a / "results.json") == ["bert-base-cased", "bert-base-cased #2"]
    assert len(set(names(a, b, a, half, other))) == 5
    assert names(a, saved("e", id="x/gpt2")) == ["bert-base-cased", "gpt2"]


# ---- like for like


@pytest.mark.usefixtures("no_figures")
def test_what_was_measured_differently_is_said() -> None:
    one, other = make_result(blocks=2), make_result(blocks=2, id="other", samples=8)
    assert compare(one, make_result(blocks=2, id="other")).differences == {}
    other.settings |= {"length": 64, "data": "b.txt", "dtype": "bfloat16", "batch_size": 1}
    found = compare(one, other)
    assert found.differences == {
        "data": {"bert-base-cased": "32 bundled biographies", "other": "b.txt"},
        "samples": {"bert-base-cased": "32", "other": "8"},
        "length": {"bert-base-cased": "128", "other": "64"},
    }
    assert len(found.tables["differences"]) == 6
    page = found.to_html()
    assert "Not like for like" in page and "<td>b.txt</td>" in page and "measured differently" in page
    alike = compare(one, make_result(blocks=2, id="other")).to_html()
    assert "Not like for like" not in alike and "measured alike" in alike


# ---- the page


def test_a_curve_a_run_by_layer_and_by_relative_depth(two: Comparison) -> None:
    page = two.to_html()
    titles = re.findall(r"<title>([^<]*, layer \d+: [^<]*)</title>", page)
    assert len(titles) == 4 * (13 + 7), "two scales, by layer and by relative depth"
    assert page.count("By relative depth") >= 2
    same = compare(make_result(blocks=3, init=False), weaker(blocks=3, init=False, id="x")).to_html()
    assert "By relative depth" not in same
    assert two.to_html() == page, "the same runs give the same bytes"


def test_no_two_styles_are_the_same() -> None:
    styles = styles_of([str(i) for i in range(8 * len(DASHES))])
    assert len(set(styles.values())) == len(styles)


def test_names_are_escaped() -> None:
    bad = make_result(blocks=2, init=False, id="<img src=x onerror=alert(1)>")
    made = compare(bad, make_result(blocks=2, init=False))
    made = Comparison(made.runs, [Failure("<b>f</b>", "<script>no</script>")])
    page = made.to_html()
    assert "<img src=x" not in page and "<b>f" not in page and "<script>no" not in page
    assert "&lt;script&gt;no" in page


def test_over_training_there_are_lines_and_a_map() -> None:
    made = training([0, 10, 100, 1000])
    assert made.training
    page = made.to_html()
    heat = page[page.index('id="figure-map"') : page.index('id="figure-runs"')]
    cells = re.findall(r"<title>step (\d+), layer (\d+): ([\d.]+)</title>", heat)
    whole = {(step, layer): value for step, layer, value in cells}
    assert len(cells) == len(whole) == 4 * 5, "every step and layer has a cell"
    for run in made.runs:
        for layer, value in enumerate(curve_of(run.result)):
            assert float(whole[str(run.step), str(layer)]) == pytest.approx(value, rel=6e-3)
    for layer in (0, 2, 4):
        assert (
            f">layer {layer}<" in page.replace("</svg> ", ">").replace("\n</li>", "<")
            or f"layer {layer}" in page
        )
    assert headline(made)[0].startswith(
        f"{curve_of(made.runs[-1].result)[-1]:.2f} relative residual at the last"
    )
    assert "The colours always go from 0 (stands out from the page) to 1;" in heat
    bar = [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", heat) if "." in text]
    assert bar == ["0.2", "0.4", "0.6", "0.8"]
    assert "after step 1,000; it was" in headline(made)[0]
    assert made.tables["residuals"]["step"].unique().tolist() == [0, 10, 100, 1000]


def test_a_long_training_draws_some_checkpoints_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawing.MOST_CELLS == 1500
    monkeypatch.setattr(drawing, "MOST_CELLS", 120)
    monkeypatch.setattr(drawing, "MOST_CURVES", 2)  # of the figure below
    made = training(list(range(40)))  # of 5 layers
    page = made.to_html()
    heat = page[page.index('id="figure-map"') : page.index('id="figure-runs"')]
    drawn = set(re.findall(r"<title>step (\d+), layer", heat))
    assert "Every 2. checkpoint is drawn" in page
    assert drawn == {str(step) for step in (*range(0, 40, 2), 39)}
    assert len(made.tables["runs"]) == 40


@pytest.mark.usefixtures("no_figures")
def test_checkpoints_of_several_depths_are_only_compared() -> None:
    made = training([0, 10])
    made.runs[1].result.model["blocks"] = 5
    assert not made.training
    assert "Every layer over training" not in made.to_html()


# ---- files and command


@pytest.mark.usefixtures("no_figures")
def test_files_are_the_tables(two: Comparison, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    two.save(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.html", "results.json", "runs.csv", "residuals.csv", "ablations.csv"}, (
        "no run is as deep as the first"
    )
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (saved["schema"], saved["kind"]) == (1, "comparison")
    assert saved["settings"]["like_for_like"] is True
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "out" / "runs.csv"), pd.DataFrame(saved["tables"]["runs"]), check_dtype=False
    )
    with pytest.raises(RcProbeError, match="a comparison, not a run"):
        rc_probe.compare(tmp_path / "out", tmp_path / "out")


@pytest.mark.usefixtures("no_figures")
def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_result(blocks=2, init=False, deep=False).save("a")
    weaker(0.3, blocks=3, init=False, deep=False, samples=4, id="m").save("b")

    def call(*words: str) -> tuple[int, str, str]:
        try:
            main(["compare", *words])
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    code, out, _ = call("a", "b/results.json", "--out", "c")
    assert code == 0
    for word in ("bert-base-cased", "collapsed", "Not like for like: samples is 32 in bert-base-cased, 4 in m", "▇",
                 "c/report.html"):  # fmt: skip
        assert word in out
    code, out, _ = call("a", "b", "--out", "c", "--json")
    assert json.loads(out)["kind"] == "comparison"
    for words, says in (
        (["a"], "1 runs cannot be compared"),
        (["a", "none"], "none/results.json|none: cannot read"),
        (["a", "b", "--out", "a"], "would replace the run a"),
        (["a", "b", "--out", "a/results.json"], "is a file"),
    ):
        code, out, err = call(*words)
        assert (code, out) == (2, "")
        assert re.search(says, err) and err.count("\n") == 1
    assert ProbeResult.load("a").model["id"] == "bert-base-cased"


def test_what_each_block_is_worth_stands_beside_each_other() -> None:
    """Tables below each other, and a column for each run where all are judged by the same metric."""
    columns = {"head": None, "baseline": 3.0, "low": None, "high": None, "count": 16}
    runs = [make_result(blocks=n, deep=False, init=False, id=f"org/{n}") for n in (2, 3)]
    for n, result in enumerate(runs, 2):
        rows = [
            {
                "component": "block",
                "block": b,
                "metric": "loss",
                "value": 3 + n / b,
                "change": n / b,
                **columns,
            }
            for b in range(1, n + 1)
        ]
        result.tables["importance"] = result.declared["importance"].frame(rows)
    both = compare(*runs)
    assert both.tables["importance"][["run", "block", "change"]].to_numpy().tolist() == [
        ["2", 1, 2.0], ["2", 2, 1.0], ["3", 1, 3.0], ["3", 2, 1.5], ["3", 3, 1.0],
    ]  # fmt: skip
    text = both.to_html()
    start = text.index("<h2>What each block is worth</h2>")
    own = text[start : text.index("</section>", start)]
    assert re.findall(r"<td[^>]*>([^<]*)</td>", own) == [
        "block 1", "2.00", "3.00", "block 2", "1.00", "1.50", "block 3", "–", "1.00",
    ]  # fmt: skip
    runs[1].tables["importance"]["metric"] = "kl"
    assert "What each block is worth" not in compare(*runs).to_html()
