"""The report as a file: small, self-contained, escaped, whole, the same for the same result, and true."""

import base64
import gzip
import hashlib
import io
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest
from support.made_results import ABLATIONS, PRETRAINED, make_result
from support.pages import fills
from support.places import TESTS

from rc_probe.registry import METRICS
from rc_probe.result import ProbeResult
from rc_probe.results.words import number, power_of_ten

VOID = {"meta", "link", "br", "img", "input", "hr"}
SAN_ONLY = {"SAN": (0.84, 3.0)}


class Page(HTMLParser):
    """The elements of a page, read strictly: every tag closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def values(self, attribute: str) -> list[str]:
        return [value for _, attrs in self.elements if (value := attrs.get(attribute)) is not None]


def drop_table(name: str) -> ProbeResult:
    result = make_result(blocks=3)
    del result.tables[name]
    return result


def nothing() -> ProbeResult:
    return ProbeResult({}, {}, {}, {})


def all_missing() -> ProbeResult:
    result = make_result(blocks=2)
    for frame in result.tables.values():
        for column in frame.select_dtypes("float"):
            frame[column] = math.nan
    return result


def with_seeds() -> ProbeResult:
    result = make_result(blocks=3)
    init = result.residuals[result.residuals["weights"] == "init"]
    rows = [init.assign(seed=seed, mean=init["mean"] * (1 + seed / 50)) for seed in (1, 2)]
    result.tables["init_seeds"] = pd.concat(rows)[["seed", "variant", "layer", "metric", "mean"]]
    return result


CASES = {
    "full": lambda: make_result(ablations=ABLATIONS),
    "plain": make_result,
    "no init": lambda: make_result(init=False, ablations=["mlp@7"]),
    "one block, one sample": lambda: make_result(blocks=1, init=False, samples=1, deep=False),
    "images": lambda: make_result(modality="image", blocks=4),
    "seeds": with_seeds,
    "other metrics only": lambda: make_result(metrics=["norm", "cosine"], blocks=2),
    "only an ablation": lambda: make_result(pretrained={}, ablations=["mlp@7"], init=False),
    "only residuals": lambda: ProbeResult({}, {}, {}, {"residuals": make_result(blocks=2).residuals}),
    "no residuals": lambda: drop_table("residuals"),
    "no structure": lambda: drop_table("structure"),
    "no recursion": lambda: drop_table("recursion"),
    "no bounds": lambda: drop_table("bounds"),
    "no paths": lambda: make_result(paths=False),
    "no counts": lambda: drop_table("path_counts"),
    "no effects": lambda: drop_table("paths"),
    "no chains": lambda: drop_table("chains"),
    "all missing": all_missing,
    "nothing": nothing,
}


@cache
def page_of(case: str) -> str:
    return CASES[case]().to_html()


@pytest.fixture(scope="module")
def full() -> str:
    return page_of("full")


@pytest.mark.parametrize("case", CASES)
def test_every_result_makes_a_whole_page(case: str) -> None:
    text = page_of(case)
    page = Page(text)
    assert "nan" not in re.findall(r"[a-z]+", "".join(page.text).replace("\n", " ").lower())
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    known = set(ids)
    used = re.findall(r"url\(#([^)]+)\)", text) + [h[1:] for h in page.values("href") if h.startswith("#")]
    assert set(used) <= known
    assert not page.values("style"), "a strict policy blocks these"
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]


def test_a_large_report_is_small(full: str) -> None:
    """12 layers, four variants, pretrained and init, six ablations, eight metrics."""
    assert len(full.encode()) < 500_000


def test_size_is_bounded_where_tables_are_large() -> None:
    result = make_result(blocks=48, ablations=ABLATIONS)
    text = result.to_html()
    assert "<code>residuals.csv</code> (beside this page)" in text
    assert max(len(link) for link in re.findall(r'href="([^"]*)"', text)) < 168 * 1024


def test_nothing_outside_is_referred_to(full: str) -> None:
    page = Page(full)
    links = page.values("href") + page.values("src")
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "http" not in re.sub(r'href="data:[^"]*"', "", full).replace("http-equiv", "")
    assert "@import" not in full and "url(h" not in full


def test_the_policy_allows_this_style_and_this_script_alone(full: str) -> None:
    (policy,) = (
        attrs["content"] for tag, attrs in Page(full).elements if "http-equiv" in attrs and tag == "meta"
    )
    assert policy and policy.startswith("default-src 'none';") and "unsafe" not in policy
    for tag in ("style", "script"):
        (source,) = re.findall(f"<{tag}>(.*?)</{tag}>", full, re.DOTALL)
        wanted = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{wanted}'" in policy


def test_what_the_user_wrote_is_shown_and_not_run() -> None:
    evil = "<script>alert(1)</script>\"'&{{7*7}}$x$"
    result = make_result(ablations=["mlp@7"], id=evil, proved=[evil], **{evil: evil})
    result.settings["data"] = result.settings["command"] = evil
    result.environment["platform"] = evil
    for frame, column in (("residuals", "variant"), ("ablations", "component"), ("structure", "name")):
        result.tables[frame][column] = result.tables[frame][column].replace({"mlp@7": evil, "mlp": evil})
    result.tables["structure"]["name"] = evil
    text = result.to_html()
    assert len(re.findall("<script", text)) == 1 and "alert(1)</script>" not in text
    shown = "".join(Page(text).text)
    assert shown.count("<script>alert(1)</script>") > 10
    assert "{{7*7}}" in shown
    assert re.search(r"<text[^>]*>[^<]*\$x\$", text), "not read as mathematics"
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(svg)


@pytest.mark.usefixtures("no_figures")
def test_a_lone_surrogate_does_not_stop_the_writing(tmp_path: Path) -> None:
    make_result(blocks=1, init=False, id="name \ud800").save(tmp_path)
    assert "name" in (tmp_path / "report.html").read_text("utf-8")


def test_the_same_result_gives_the_same_bytes() -> None:
    code = "from support.made_results import make_result; import sys; sys.stdout.write(make_result(ablations=['mlp@7']).to_html())"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(TESTS)}
    other = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True
    ).stdout
    assert other == make_result(ablations=["mlp@7"]).to_html().encode()


def test_the_users_matplotlib_is_left_alone() -> None:
    import matplotlib as mpl

    with mpl.rc_context({"axes.linewidth": 9.0, "font.size": 30.0, "lines.color": "#ff0000"}):
        before = dict(mpl.rcParams)
        text = make_result(blocks=2).to_html()
        assert dict(mpl.rcParams) == before
    assert text == make_result(blocks=2).to_html()


@pytest.mark.usefixtures("no_figures")
def test_the_tables_inside_are_the_tables() -> None:
    result = make_result(ablations=ABLATIONS, paths=False)
    links = dict(re.findall(r'download="([^"]+)" href="([^"]*)"', result.to_html()))
    for name, frame in result.tables.items():
        content = unquote(links[f"{name}.csv"].partition(",")[2])
        assert content == frame.to_csv(index=False, lineterminator="\n")
        assert len(pd.read_csv(io.StringIO(content))) == len(frame)


@pytest.mark.usefixtures("no_figures")
def test_a_small_result_is_inside_as_a_whole(tmp_path: Path) -> None:
    result = make_result(blocks=3)
    link = dict(re.findall(r'download="([^"]+)" href="([^"]*)"', result.to_html()))["results.json.gz"]
    packed = base64.b64decode(link.partition(",")[2])
    assert gzip.decompress(packed).decode() == result.to_json()
    (tmp_path / "results.json.gz").write_bytes(packed)
    assert ProbeResult.load(tmp_path / "results.json.gz").to_html() == result.to_html()


def test_figures_say_their_numbers_in_words(full: str) -> None:
    figures = [attrs for tag, attrs in Page(full).elements if tag == "svg" and "aria-hidden" not in attrs]
    assert len(figures) == 4 + 1 + len(ABLATIONS) + (3 + 2 + 1) + 2 + 7
    assert all(figure["role"] == "img" for figure in figures)
    labels = [figure["aria-label"] or "" for figure in figures]
    assert labels[0].startswith("Pretrained. ") and "SAN+skip 0.84 at layer 0, 0.46 at layer 12" in labels[0]
    assert all(re.search(r"\d", label) for label in labels)


def test_values_at_the_floor_are_drawn_hollow(full: str) -> None:
    figure = full[full.index('id="figure-residual"') : full.index("</figure>")]
    marks = [
        mark for svg in re.findall(r"<svg.*?</svg>", figure, re.DOTALL) for mark in fills(ET.fromstring(svg))
    ]
    assert len(marks) == 2 * 2 * 4 * 13
    for title, fill in marks:
        assert ("noise (floor" in title) == fill.startswith("var(--panel"), (title, fill)
    titles = re.findall("<title>(SAN, layer [^<]*)</title>", full)
    noise = {title for title in titles if "noise (floor" in title}
    assert all("layer 3:" in t or int(re.findall(r"layer (\d+)", t)[0]) > 3 for t in noise)
    assert {t for t in titles if "layer 1:" in t}.isdisjoint(noise) and noise
    assert full.count("<pattern") >= 4, "the region below the floor is hatched"


def figure_of(text: str, name: str) -> str:
    start = text.index(f'id="figure-{name}"')
    return text[start : text.index("</figure>", start)]


def test_bands_over_seeds_say_so(full: str) -> None:
    shown = figure_of(page_of("seeds"), "residual")
    assert "± 1 std over samples and seeds" in shown and "over 2 seeds where freshly initialised" in shown
    assert "± 1 std over samples</li>" in full and "seeds" not in figure_of(full, "residual")


def test_the_bound_is_drawn_above_the_recursion_and_hollow_where_vacuous(full: str) -> None:
    shown = figure_of(full, "recursion")
    marks = [m for svg in re.findall(r"<svg.*?</svg>", shown, re.DOTALL) for m in fills(ET.fromstring(svg))]
    bounds = [mark for mark in marks if mark[0].startswith("One-layer bound, layer")]
    assert len(bounds) == 2 * 4, "that of layer 1 is beyond floats"
    for title, fill in bounds:
        assert ("vacuous: scores spread" in title) == fill.startswith("var(--panel"), (title, fill)
        assert ("layer 2:" in title) == ("vacuous" in title)
    result = make_result()
    residual = result.recursion.query("weights == 'init' and layer == 3")["residual"].item()
    row = result.bounds.query("weights == 'init' and layer == 3").iloc[0]
    height = number(residual * row["bound_out"] / row["residual_out"], 3)
    assert f"One-layer bound, layer 3: {height}" in [title for title, _ in bounds]
    assert "one-layer bound, hollow where vacuous" in shown
    assert "bound" not in figure_of(page_of("no bounds"), "recursion").lower()


@pytest.mark.usefixtures("no_figures")
def test_the_bound_is_told_for_each_weights() -> None:
    result = make_result()
    bounds = result.tables["bounds"]
    bounds.loc[bounds["weights"] == "init", "vacuous"] = True
    text = result.to_html()
    one = "the one-layer bound says something at"
    assert f"Pretrained: {one} 3 of the 5 layers measured, theorem 2.2 unrolled from layer 1 at none." in text
    assert f"Freshly initialised: {one} none of the 5 layers measured, theorem" in text
    bounds.loc[bounds["layer"] < 3, "unrolled_vacuous"] = False
    assert "5 layers measured, theorem 2.2 unrolled from layer 1 at 2." in result.to_html()
    del bounds["unrolled_vacuous"]  # as older versions wrote it
    assert f"Pretrained: {one} 3 of the 5 layers measured.</p>" in result.to_html()


def test_san_is_spelt_out(full: str) -> None:
    for name in ("residual", "metrics", "recursion"):
        assert "self-attention network" in figure_of(full, name).partition("</p>")[0], name
    whole = make_result(
        pretrained={"transformer": (0.84, 0.99)}, init=False, deep=False, paths=False
    ).to_html()
    assert "self-attention network" not in whole, "there is none on this page"


def test_the_papers_variants_are_no_ablations_of_the_users(full: str) -> None:
    assert "With parts of the model off" not in page_of("plain")
    titles = re.findall(r"<title>([^<]*) → [^<]*</title>", figure_of(full, "ablations"))
    assert [title.partition(":0")[0].rpartition(": ")[0] for title in titles] == list(ABLATIONS)


def test_an_ablation_that_collapses_does_not_squeeze_the_others() -> None:
    result = make_result(ablations=["mlp@7", "mlp.skip"])
    table = result.tables["residuals"]
    table.loc[(table["variant"] == "mlp.skip") & (table["layer"] > 3), "mean"] = 1e-7
    labels = re.findall(r'aria-label="([^."]*(?:\.skip)?[^."]*)\.', figure_of(result.to_html(), "ablations"))
    assert labels[1:] == ["mlp@7", "mlp.skip, log scale"]
    assert "log" not in labels[0]


def test_figures_of_seaborn_import_no_torch(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(make_result(blocks=1).to_json())
    code = (
        "import sys; from rc_probe.result import ProbeResult; ProbeResult.load('results.json').to_html()\n"
        "assert 'seaborn' in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_definitions_and_command_are_told(full: str) -> None:
    shown = "".join(Page(full).text)
    for name in ("residual", "cosine", "effective_rank"):
        metric = METRICS[name]
        assert metric.title in shown and metric.formula in shown and metric.source in shown
    assert "rc-probe bert-base-cased --samples 32" in shown and "torch" in shown
    assert METRICS["residual_argmin"].title not in shown, "it was not measured"


def test_one_term_for_the_residual(full: str) -> None:
    title = METRICS["residual"].title
    assert title == "Relative residual"
    assert f"<h2>{title} by layer</h2>" in full and f'<th scope="row">{title}</th>' in full
    assert title.lower() in make_result().verdict["sentence"] and "uniformity" not in full.lower()


VERDICTS = {
    "healthy": (
        {},
        "healthy",
        "0.76 relative residual at layer 12 of 12: bert-base-cased keeps its tokens apart",
    ),
    "less than half": (
        {"transformer": (0.84, 0.93)},
        "watch",
        "closer together, to less than half of what entered",
    ),
    "a tenth": ({"transformer": (0.84, 0.8)}, "collapsed", "brings its tokens together to less than a tenth"),
    "floor": (
        {"transformer": (0.84, 0.2)},
        "collapsed",
        "ends with all tokens the same, as far as this arithmetic",
    ),
    "equal from the start": (
        {"transformer": (1e-8, 1.0)},
        "collapsed",
        "gets tokens that are already the same",
    ),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_verdict_has_its_number_first_and_its_level(case: str) -> None:
    curves, level, words = VERDICTS[case]
    verdict = make_result(pretrained={**PRETRAINED, **curves}).verdict
    assert verdict["level"] == level
    assert words in verdict["sentence"]
    assert verdict["sentence"].startswith(number(verdict["value"]) + " relative residual at layer 12")
    assert (
        verdict["value"]
        == make_result(pretrained={**PRETRAINED, **curves})
        .residuals.query(
            "weights == 'pretrained' and variant == 'transformer' and metric == 'residual' and layer == 12"
        )["mean"]
        .item()
    )


RULES = {
    "healthy": (
        {},
        "layer 12 keeps at least half of the residual that entered block 1, every layer on the way at least a "
        "tenth, and the tokens’ directions do not contradict it",
    ),
    "no cosine": (
        {"metrics": ["residual"]},
        "layer 12 keeps at least half of the residual that entered block 1, and every layer on the way at least a tenth",
    ),
    "one block": (
        {"metrics": ["residual"], "blocks": 1},
        "layer 1 keeps at least half of the residual that entered block 1",
    ),
    "half": (
        {"metrics": ["residual"], "pretrained": {"transformer": (0.84, 0.93)}},
        "layer 12 keeps less than half of the residual that entered block 1",
    ),
    "a tenth": (
        {"pretrained": {"transformer": (0.84, 0.8)}},
        "layer 12 keeps less than a tenth of the residual that entered block 1",
    ),
    "floor": ({"pretrained": {"transformer": (0.84, 0.2)}}, "layer 12 is at its rounding floor"),
    "from the start": (
        {"pretrained": {"transformer": (1e-8, 1.0)}},
        "what enters block 1 is at its rounding floor",
    ),
}


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("case", RULES)
def test_the_level_says_only_what_applies(case: str) -> None:
    options, rule = RULES[case]
    result = make_result(**options)
    assert result.verdict["rule"] == rule
    assert f" because {rule}." in "".join(Page(result.to_html()).text)


def test_two_reasons_to_watch_are_both_told() -> None:
    result = make_result(init=False, metrics=["residual"], pretrained={"transformer": (0.84, 0.93)})
    rows = result.tables["residuals"]
    rows.loc[rows["layer"] == 5, "mean"] = 0.05
    half = "keeps less than half of the residual that entered block 1, and layer 5 less than a tenth"
    assert result.verdict["rule"] == f"layer 12 {half}"
    rows.loc[rows["layer"] == 12, "mean"] = 0.8
    del result.__dict__["verdict"]
    assert result.verdict["rule"] == "layer 5 keeps less than a tenth of the residual that entered block 1"


def reasons(**options: object) -> str:
    return " ".join(make_result(**options).verdict["reasons"])  # type: ignore[arg-type]


def test_what_holds_it_up_is_what_the_variants_say() -> None:
    assert (
        "falls to the rounding floor (5.3×10⁻⁷) by layer 3; attention skips alone keep 0.46, MLPs"
        in reasons()
    )
    apart = {**PRETRAINED, "SAN+MLP": (0.84, 0.98)}
    assert (
        "attention skips (0.46) or MLPs (0.67) are each enough to keep at least half of the whole model’s 0.76."
        in reasons(pretrained=apart)
    )
    mlp = {**apart, "SAN+skip": (0.84, 0.7)}
    assert "MLPs alone keep 0.67, attention skips alone 0.012" in reasons(pretrained=mlp)
    neither = {**PRETRAINED, "SAN+skip": (0.84, 0.7)}
    assert (
        "neither attention skips (0.012) nor MLPs (0.043) alone keep half of the whole model’s 0.76."
        in reasons(pretrained=neither)
    )
    assert "MLPs alone 0, at rounding." in reasons(pretrained={**PRETRAINED, "SAN+MLP": (0.84, 0.2)})
    held = {**PRETRAINED, "SAN": (0.84, 0.98)}
    assert "ends at 0.67, so attention alone keeps at least half of the whole model’s 0.76." in reasons(
        pretrained=held
    )


def test_nothing_is_said_to_hold_up_a_collapsed_model() -> None:
    text = reasons(pretrained={**PRETRAINED, "transformer": (0.84, 0.2)})
    assert "alone" not in text and "enough" not in text and "SAN" in text


def test_the_init_is_compared_where_there_is_one() -> None:
    assert "The same architecture freshly initialised ends at 0.42." in reasons()
    assert "initialised" not in reasons(init=False)


def test_the_costliest_ablation_is_named() -> None:
    assert "Of 6 ablations, attention.skip@all lowers it most: 0.76 → 0.043." in reasons(ablations=ABLATIONS)
    assert "Ablating mlp@7 lowers it: 0.76 → 0.71." in reasons(ablations=["mlp@7"])
    assert "Ablating attention@1-2 does not lower it: 0.76 → 0.78." in reasons(ablations=["attention@1-2"])


def ending(changes: dict[str, float], floor: float = 1e-7) -> str:
    """The reasons where ablations end so far from the whole model's last residual, 0.60494."""
    result = make_result(ablations=list(changes), init=False)
    table = result.tables["residuals"]
    last = table["layer"] == table["layer"].max()
    for name, change in {"transformer": 0.0, **changes}.items():
        here = last & (table["variant"] == name) & (table["weights"] == "pretrained")
        table.loc[here, ["mean", "floor"]] = (0.60494 + change, floor)
    return " ".join(result.verdict["reasons"])


def test_a_small_change_has_the_digits_that_show_it() -> None:
    assert "Ablating mlp@7 lowers it: 0.6049 → 0.6045." in ending({"mlp@7": -0.00043})
    assert "Ablating mlp@7 does not lower it: 0.6049 → 0.6050." in ending({"mlp@7": 0.00004})
    both = ending({"mlp@7": -0.00043, "attention@1-2": 0.1})
    assert "Of 2 ablations, mlp@7 lowers it most: 0.6049 → 0.6045." in both


def test_a_change_within_rounding_is_none() -> None:
    assert "Ablating mlp@7 does not lower it: 0.60, the same up to rounding." in ending(
        {"mlp@7": -0.00043}, 3e-4
    )
    assert "Ablating mlp@7 lowers it: 0.6049 → 0.6045." in ending(
        {"mlp@7": -0.00043}, 2e-4
    )  # the floors of both
    assert "None of 2 ablations lowers it." in ending({"mlp@7": -0.00043, "attention@1-2": -0.0002}, 3e-4)


def test_ablations_that_are_the_same_are_named_once() -> None:
    def same(*names: str, others: tuple[str, ...] = ()) -> str:
        result = make_result(ablations=[*names, *others], init=False)
        table = result.tables["residuals"]
        means = table.loc[table["variant"] == names[0], "mean"].to_numpy()
        for name in names[1:]:
            table.loc[table["variant"] == name, "mean"] = means
        return " ".join(result.verdict["reasons"])

    assert "Ablating mlp@7 or head@2:5 lowers it: 0.76 → 0.71." in same("mlp@7", "head@2:5")
    three = same("mlp@7", "head@2:5", others=("attention@1-2",))
    assert "Of 3 ablations, mlp@7 and head@2:5 lower it most, by the same: 0.76 → 0.71." in three


def test_directions_that_come_together_are_told() -> None:
    result = make_result(metrics=["residual", "cosine"], init=False)
    cosine = (result.tables["residuals"]["metric"] == "cosine") & (result.tables["residuals"]["layer"] == 12)
    result.tables["residuals"].loc[cosine, "mean"] = 0.97
    assert result.verdict["level"] == "watch"
    assert "but they turn the same way" in result.verdict["sentence"]
    assert result.verdict["reasons"][0].startswith(
        "The mean cosine between two tokens is 0.970 at layer 12 (0.3"
    )


def test_the_verdict_is_about_what_there_is() -> None:
    only = make_result(pretrained=SAN_ONLY, init=False)
    assert (
        ": bert-base-cased as SAN (SAN: self-attention network) ends with all tokens the same"
        in only.verdict["sentence"]
    )
    ablated = make_result(pretrained={}, ablations=["mlp@7"], init=False)
    assert ": bert-base-cased with mlp@7 ablated keeps" in ablated.verdict["sentence"]
    fresh = make_result(pretrained={})
    assert fresh.verdict["weights"] == "init"
    assert ": bert-base-cased, freshly initialised, keeps" in fresh.verdict["sentence"]
    assert fresh.verdict["reasons"] and "same architecture" not in " ".join(fresh.verdict["reasons"])
    for empty in (nothing(), all_missing(), make_result(metrics=["norm"])):
        assert empty.verdict["level"] is None and empty.verdict["value"] is None
        assert empty.verdict["sentence"].startswith("No relative residual was measured on ")


def test_one_layer_alone_gets_no_level() -> None:
    result = make_result()
    result.tables["residuals"] = result.residuals[result.residuals["layer"] == 0]
    assert result.verdict["level"] is None and "at layer 0 of 12" in result.verdict["sentence"]


def test_a_low_point_on_the_way_is_told() -> None:
    result = make_result(init=False, metrics=["residual"])
    rows = result.tables["residuals"]
    rows.loc[(rows["variant"] == "transformer") & (rows["layer"] == 5), "mean"] = 0.05
    assert result.verdict["level"] == "watch"
    assert result.verdict["sentence"].endswith("(0.84 at layer 0, lowest 0.050 at layer 5).")


NUMBERS = {
    0.857: "0.86", 0.999: "1.0", 0.0021: "0.0021", 1.9e-7: "1.9×10⁻⁷", 1234.5: "1,234", 12.34: "12",
    0.0: "0", 1e-320: "1.0×10⁻³²⁰", -0.25: "−0.25", 9.96e-8: "1.0×10⁻⁷", 2.5e9: "2.5×10⁹",
}  # fmt: skip


@pytest.mark.parametrize(("value", "shown"), NUMBERS.items())
def test_numbers_are_shown(value: float, shown: str) -> None:
    assert number(value) == shown


def test_missing_numbers_are_a_dash() -> None:
    assert [number(value) for value in (None, math.nan, math.inf)] == ["–"] * 3
    assert power_of_ten(-174) == "10⁻¹⁷⁴"


@pytest.mark.usefixtures("no_figures")
def test_notes_are_told_and_whole_numbers_stay_whole() -> None:
    result = make_result(blocks=2)
    result.tables["structure"]["heads"] = [12.0, math.nan, 12.0, math.nan]
    text = result.to_html()
    assert "<p>Note: From layer 6 on the residual is below the range of float64.</p>" in text
    assert '<td data-value="12">12</td>' in text and '<td data-value="">–</td>' in text


def test_an_exact_zero_has_its_mark_on_the_log_scale() -> None:
    """Half precision can make all tokens equal to the last bit."""
    result = make_result()
    table = result.tables["residuals"]
    collapsed = (table["variant"] == "SAN") & (table["layer"] > 3)
    table.loc[collapsed & (table["metric"] == "residual"), ["mean", "std"]] = 0.0
    assert "SAN, layer 12: 0" in result.to_html()
