"""What the report and the terminal say of paths: the sentence, its honesty, the figures, and a row for every number."""

import math
import re
from typing import Any

import pandas as pd
import pytest
from support.made_results import make_result
from support.paths_by_hand import path_entry

from rc_probe.result import ProbeResult
from rc_probe.results.path_verdict import percent, rows_of, series, short


def with_agreement(values: dict[str, list[float]], **entry: Any) -> ProbeResult:
    """A result of len(up_to) − 1 blocks with these exact agreements by scope, and `none` and `baseline` (one each)."""
    result = make_result(blocks=len(values["up_to"]) - 1)
    result.model["paths"] |= entry
    table = result.tables["paths"]
    for scope, column in values.items():
        exact = table["estimator"].isin(["exact", "baseline"])
        rows = table.index[exact & (table["scope"] == scope) & (table["metric"] == "agreement")]
        table.loc[rows, "mean"] = column
        table.loc[rows, ["low", "high"]] = [[value - 0.02, value + 0.02] for value in column]
    return result


def test_a_length_that_was_not_measured_is_no_row() -> None:
    result = with_agreement({"up_to": [0.4, math.nan, 0.976, 1]})
    found = series(result, "agreement", "up_to")
    assert found is not None and found.lengths == [0, 2, 3] and found.means == [0.4, 0.976, 1]
    rows = rows_of(result, metric="agreement", scope="up_to", estimator="exact")
    assert rows["length"].tolist() == [0, 2, 3]


SENTENCES = {
    "two": (
        {"up_to": [0.4, 0.8, 0.976, 0.98, 1]},
        "Paths of length ≤ 2 reproduce 98 % of the model’s predictions (masked token, 32 texts).",
    ),
    "not rounded up to enough": (
        {"up_to": [0.4, 0.9499, 0.9999, 1]},
        "Paths of length ≤ 2 reproduce over 99.9 % of the model’s predictions (masked token, 32 texts).",
    ),
    "no head": (
        {"up_to": [0.96, 0.97, 1]},
        "Paths of length 0, with no head on them, reproduce 96 % of the model’s predictions (masked token, 32 texts).",
    ),
    "all of them": (
        {"up_to": [0.1, 0.3, 0.7, 1]},
        "It takes paths of every length, up to 3, to reproduce 95 % of the model’s predictions; those of length ≤ 2 "
        "reproduce 70 % (masked token, 32 texts).",
    ),
    "never": (
        {"up_to": [0.1, 0.8, 0.7, 0.75]},
        "Paths up to length 3 do not reproduce 95 % of the model’s predictions; the most is 80 %, with length ≤ 1 "
        "(masked token, 32 texts).",
    ),
    "biases do as much": (
        {"up_to": [0.9, 0.97, 1], "none": [0.6], "baseline": [0.3]},
        "Paths of length ≤ 1 reproduce 97 % of the model’s predictions (masked token, 32 texts), but biases alone, "
        "without any path, already give 60 %.",
    ),
    "one answer does as much": (
        {"up_to": [0.9, 0.97, 1], "none": [0.2], "baseline": [0.9]},
        "Paths of length ≤ 1 reproduce 97 % of the model’s predictions (masked token, 32 texts), but always the "
        "commonest answer would give 90 %.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SENTENCES)
def test_the_sentence(case: str) -> None:
    values, sentence = SENTENCES[case]
    assert with_agreement(values).verdict["paths"]["sentence"] == sentence


def test_the_sentence_has_its_numbers() -> None:
    found = with_agreement({"up_to": [0.4, 0.8, 0.976, 0.98, 1]}).verdict["paths"]
    assert (found["length"], found["value"], found["enough"], found["metric"]) == (
        2,
        0.976,
        True,
        "agreement",
    )
    assert (found["low"], found["high"]) == pytest.approx((0.956, 0.996))
    assert (found["task"], found["samples"]) == ("masked token", 32)


def test_agreement_of_embeddings_is_of_nearest_neighbours() -> None:
    found = with_agreement({"up_to": [0.4, 0.96, 1]}, task="retrieval").verdict["paths"]
    assert found["sentence"] == (
        "Paths of length ≤ 1 find the nearest neighbour that the whole model finds for 96 % of the texts "
        "(retrieval, 32 texts)."
    )


def test_a_wide_interval_and_a_single_value_are_told() -> None:
    result = with_agreement({"up_to": [0.4, 0.96, 1]})
    table = result.tables["paths"]
    here = (table["scope"] == "up_to") & (table["length"] == 1) & (table["estimator"] == "exact")
    table.loc[here, ["low", "high"]] = [0.71, 1.21]
    assert "(masked token, 32 texts; 95 % interval 71 to 100 %)" in result.verdict["paths"]["sentence"]
    one = make_result(blocks=3, samples=1).verdict["paths"]
    assert "(masked token, 1 text; one value, so no interval)" in one["sentence"]
    assert one["low"] is None
    few = make_result(blocks=3, samples=1)
    few.model["paths"]["samples"] = 7
    assert "(masked token, 7 texts; too few for an interval)" in few.verdict["paths"]["sentence"]


def test_few_that_all_agree_have_no_interval() -> None:
    for samples, aside in ((8, "; the same in all, so no interval"), (40, "")):
        result = with_agreement({"up_to": [0.4, 0.96, 1]}, samples=samples)
        table = result.tables["paths"]
        here = (table["scope"] == "up_to") & (table["length"] == 1) & (table["estimator"] == "exact")
        table.loc[here, ["mean", "low", "high"]] = 1.0
        assert f"(masked token, {samples} texts{aside})" in result.verdict["paths"]["sentence"]


def test_a_sum_that_gets_worse_is_told() -> None:
    reasons = with_agreement({"up_to": [0.4, 0.96, 0.8, 0.9, 1]}).verdict["paths"]["reasons"]
    assert reasons[0] == "More paths are not always better: length ≤ 2 gives 80 %."
    assert "always better" not in " ".join(make_result().verdict["paths"]["reasons"])


def test_what_stands_beside_the_sentence() -> None:
    values = {"up_to": [0.4, 0.96, 1], "alone": [0.3, 0.61, 0.2], "none": [0.12], "baseline": [0.09]}
    result = with_agreement(values)
    table = result.tables["paths"]
    table.loc[(table["metric"] == "norm_share") & (table["length"] == 2), "mean"] = 0.034
    assert result.verdict["paths"]["reasons"] == [
        "Of single lengths, 1 alone gives most, 61 %; biases alone give 12 %, always the commonest answer 9 %.",
        "Accuracy with paths of length ≤ 1 is 0.53, of the whole model 0.62, of the best constant answer 0.061.",
        "Longer paths are 85 % of all 169 paths and carry 3 % of the norm.",  # 144 of 1 + 24 + 144
    ]


def test_what_longer_paths_carry_is_not_told_where_they_were_not_measured() -> None:
    result = with_agreement({"up_to": [0.4, 0.96, 0.97, 1]})
    table = result.tables["paths"]
    result.tables["paths"] = table[~(table["length"] > 2)]
    assert result.verdict["paths"]["reasons"][-1] == "Longer paths are 98 % of all 2,197 paths."


def test_without_a_task_the_norm_is_told() -> None:
    result = make_result(blocks=4)
    table = result.tables["paths"]
    kept = table[table["metric"] == "norm_share"].copy()
    kept["mean"] = [0.3, 0.15, 0.04, 0.005, 0.005]  # half of it is of biases
    result.tables["paths"] = kept
    result.model["paths"] = path_entry(task=None)
    found = result.verdict["paths"]
    assert found["sentence"] == (
        "Paths of length ≤ 2 carry 98 % of the norm of all paths; what the model makes of them was not scored."
    )
    assert found["metric"] == "norm_share" and found["length"] == 2
    assert 'id="figure-lengths"' in result.to_html() and 'id="figure-paths"' not in result.to_html()


def test_no_sentence_without_paths() -> None:
    assert make_result(paths=False).verdict["paths"] is None
    empty = make_result()
    empty.tables["paths"]["mean"] = math.nan
    assert empty.verdict["paths"] is None
    assert "Which paths" not in make_result(paths=False).to_html()


SHARES = {0.0: "0 %", 0.0004: "under 0.1 %", 0.0043: "0.4 %", 0.034: "3 %", 0.9496: "94.9 %", 0.95: "95 %", 0.976: "98 %",
          0.9967: "99.6 %", 0.99999: "over 99.9 %", 1.0: "100 %", 1.21: "100 %"}  # fmt: skip


@pytest.mark.parametrize(("share", "shown"), SHARES.items())
def test_a_share_is_never_rounded_to_all_nothing_or_enough(share: float, shown: str) -> None:
    assert percent(share) == shown


def test_counts_of_any_size_are_short() -> None:
    assert [short(1), short("9504"), short("8916100448256"), short(13**12)] == [
        "1",
        "9,504",
        "8.9×10¹²",
        "2.3×10¹³",
    ]
    assert short(128**400) == "7.7×10⁸⁴²", "beyond floats"


# ---- the page


def titles_of(text: str, figure: str) -> list[str]:
    start = text.index(f'id="figure-{figure}"')
    return re.findall("<title>([^<]*)</title>", text[start : text.index("</figure>", start)])


def test_every_value_that_is_drawn_tells_its_number() -> None:
    result = make_result(blocks=4)
    titles = titles_of(result.to_html(), "paths")
    table = result.tables["paths"]
    row = table.query(
        "estimator == 'sampled' and drawn == 20 and scope == 'alone' and metric == 'accuracy'"
    ).iloc[2]
    wanted = (
        f"Sampled, 20 paths of length k, k = 2: {row['mean']:.3g} ({row['low']:.3g} to {row['high']:.3g})"
    )
    assert wanted.replace("-", "−") in titles
    for estimator in ("sampled, 5", "live, 5", "live, 20"):
        assert sum(title.lower().startswith(estimator + " paths") for title in titles) == 5, estimator
    for scope in ("Length k alone", "All up to k", "All but k"):
        assert sum(title.startswith(scope) for title in titles) == 2 * 5, "agreement and accuracy"
    assert "Whole model: 0.620" in titles and "Best constant answer: 0.0610" in titles
    assert "Biases alone, no path: 0.121" in titles


def test_without_labels_agreement_is_all_that_is_drawn() -> None:
    result = make_result(blocks=4)
    table = result.tables["paths"]
    result.tables["paths"] = table[~table["metric"].isin(["accuracy", "loss"])]
    text = result.to_html()
    figure = text[text.index('id="figure-paths"') : text.index('id="figure-lengths"')]
    assert figure.count('role="img"') == 2 and "Accuracy" not in figure and "whole model:" not in figure
    assert 'id="table-paths-accuracy"' not in text and 'id="table-paths-agreement"' in text


def test_norm_and_number_of_paths_by_length() -> None:
    text = make_result().to_html()
    titles = titles_of(text, "lengths")
    assert "Length 12, share of all paths: 0.383" in titles
    assert sum("share of the norm" in title for title in titles) == 14, "13 lengths and the biases"
    figure = text[text.index('id="figure-lengths"') :]
    assert ">8.9×10¹²</text>" in figure and ">9,504</text>" in figure
    result = make_result()
    norm = result.tables["paths"].query("metric == 'norm_share'")["mean"].sum()
    assert f"Biases, share of the norm: {1 - norm:.3g}" in titles
    assert any(title.startswith("GPT-3: 96 hops, mean length 95.0") for title in titles)
    assert "By source, the norm comes from tokens 58 %, positions 11 %, biases 31 %." in text


def test_an_architecture_that_is_the_model_is_not_drawn_twice() -> None:
    titles = titles_of(make_result().to_html(), "lengths")
    assert any(title.startswith("this model: 12 hops") for title in titles)
    assert not any(title.startswith("BERT-base") for title in titles)
    assert any(
        title.startswith("BERT-base") for title in titles_of(make_result(blocks=3).to_html(), "lengths")
    )


def test_chains_are_drawn_on_a_log_scale() -> None:
    text = make_result(blocks=5).to_html()
    titles = titles_of(text, "chains")
    assert "Distance to rank one, length 1: 0.400 (0.240 to 0.680)" in titles and len(titles) == 3 * 5
    assert "certifies" in text
    result = make_result(blocks=5)
    result.tables["chains"] = result.tables["chains"].query("metric == 'rank_one'").drop(columns="count")
    assert len(titles_of(result.to_html(), "chains")) == 5
    assert "certifies" not in result.to_html()


def test_a_chain_that_reaches_zero_is_drawn_on_the_edge() -> None:
    result = make_result(blocks=5)
    chains = result.tables["chains"]
    chains.loc[chains["length"] == 5, ["median", "low", "high"]] = 0.0
    text = result.to_html()
    figure = text[text.index('id="figure-chains"') :]
    (height,) = re.findall(r'viewBox="0 0 \S+ (\S+)" [^>]*role="img"', figure[: figure.index("</figure>")])
    (y,) = re.findall(r'<use[^>]* y="([^"]+)"[^>]*><title>Distance to rank one, length 5: 0 ', figure)
    assert 0 < float(y) < float(height)


def test_tables_hold_every_estimate() -> None:
    result = make_result(blocks=4)
    text = result.to_html()
    (table,) = re.findall(
        r'<table class="sortable" id="table-paths-agreement">(.*?)</table>', text, re.DOTALL
    )
    rows = result.tables["paths"].query("metric == 'agreement'")
    values = [float(value) for value in re.findall(r'data-value="([^"]+)">[^<]+ \(', table)]
    wanted = rows[rows["low"].notna()]["mean"]
    assert sorted(values) == pytest.approx(sorted(wanted), rel=1e-5)
    assert '<th scope="colgroup" colspan="3">sampled, 20 drawn</th>' in table
    assert table.count('scope="colgroup"') == 5 and table.count("<tr>") == 2 + 5 + 3


def test_notes_and_the_error_of_the_sum_are_told() -> None:
    text = make_result().to_html()
    assert "<p>Note: All lengths were measured on made-up texts.</p>" in text
    assert "to a relative error of 3.1×10⁻⁷" in text
    assert "euler_error" not in text, "the entry is no fact of the model by itself"


def test_tables_without_optional_columns_are_shown() -> None:
    result = make_result(blocks=3)
    result.tables["paths"] = result.tables["paths"].drop(columns=["low", "high", "std", "count"])
    result.tables["path_sources"] = result.tables["path_sources"].drop(columns=["low", "high"])
    del result.model["paths"]
    text = result.to_html()
    assert 'id="figure-paths"' in text and "(exact" not in result.verdict["paths"]["sentence"]


def test_what_tables_of_paths_say_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    result = make_result(blocks=2)
    result.model["paths"] |= {"task": evil, "notes": [evil]}
    result.tables["paths"]["metric"] = result.tables["paths"]["metric"].replace("loss", evil)
    result.tables["path_counts"]["model"] = result.tables["path_counts"]["model"].replace("GPT-2", evil)
    result.tables["path_sources"]["source"] = evil
    text = result.to_html()
    assert text.count("<script") == 1 and text.count("&lt;script&gt;alert(1)") > 5


def test_the_terminal_tells_it(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    from rc_probe.cli.terminal import summary

    result = make_result(blocks=4)
    summary(result, tmp_path)
    shown = capsys.readouterr().out
    found = result.verdict["paths"]
    assert found["sentence"] in shown and all(reason in shown for reason in found["reasons"])
    summary(make_result(blocks=4, paths=False), tmp_path)
    assert "aths of length" not in capsys.readouterr().out


def test_saved_and_loaded_it_says_the_same(tmp_path: Any) -> None:
    result = make_result(blocks=4)
    again = ProbeResult.load(result.save(tmp_path))
    assert again.verdict == result.verdict and again.to_html() == result.to_html()
    counts = pd.read_csv(tmp_path / "path_counts.csv", dtype={"count": str})
    assert counts["count"].tolist() == result.tables["path_counts"]["count"].tolist()
