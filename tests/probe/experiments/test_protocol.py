"""What all experiments share: claims over seeds, the runner with its finished seeds, the command, the page."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest
from support.command import Run, fails
from support.places import ROOT

import rc_probe.experiments
from rc_probe import RcProbeError
from rc_probe.experiments import NAMES, ExperimentResult, experiment
from rc_probe.experiments.protocol import Claim, Experiment, SeedRun, Sizes, with_seed
from rc_probe.results.tables import Column, Row, Table


@dataclass(frozen=True)
class DiceSizes(Sizes):
    sides: int


class Dice(Experiment[DiceSizes]):
    """Each seed's number is a tenth of it; `rolled` says which were made."""

    name, title, source = "sort", "Dice", "nobody"
    tables: ClassVar = (with_seed(Table("rolls", "Rolls", (Column("value", "float64", "what came"),))),)
    claims: ClassVar = (
        Claim("small", "nobody", lambda frames: frames["rolls"]["value"].mean(), most=0.15),
        Claim("known", "nobody", lambda frames: frames["rolls"]["value"].mean(), least=0.0, most=0.9),
        Claim("not measured", "nobody", lambda frames: float("nan"), least=1),
    )
    sizes, quick = DiceSizes(3, 6), DiceSizes(1, 4)

    def __init__(self) -> None:
        self.rolled: list[int] = []
        self.killed_at: int | None = None

    def measure(self, run: SeedRun[DiceSizes]) -> dict[str, list[Row]]:
        if run.seed == self.killed_at:
            raise KeyboardInterrupt
        self.rolled.append(run.seed)
        run.trainer.report("rolling", 1, 1)
        return {"rolls": [{"value": run.seed / 10}]}


@pytest.fixture
def dice(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dice]:
    made = Dice()
    monkeypatch.setattr("rc_probe.experiments.sort.EXPERIMENT", made)
    yield made


def test_a_claim_holds_where_it_holds_with_every_seed(dice: Dice) -> None:
    result = rc_probe.experiments.run("sort", device="cpu")
    small, known, unknown = result.claims.to_dict("records")
    assert [small[key] for key in ("measured", "low", "high", "seeds", "holds")] == [
        pytest.approx(0.1),
        0,
        0.2,
        3,
        False,
    ]
    assert (known["holds"], known["expected"]) == (True, "0 to 0.9")
    assert (small["expected"], unknown["expected"], unknown["seeds"]) == ("≤ 0.15", "≥ 1", 0)
    assert pd.isna(unknown["measured"]) and pd.isna(unknown["holds"])
    assert result.tables["rolls"].to_dict("list") == {"seed": [0, 1, 2], "value": [0, 0.1, 0.2]}
    assert result.verdict["sentence"] == "1 of 2 claims holds with every one of 3 seeds."
    assert result.verdict["reasons"] == [
        "Does not hold: small. Expected ≤ 0.15, measured 0.100 (0 to 0.200).",
        "These sizes do not decide 1 further claim.",
    ]


def test_finished_seeds_are_not_done_again(dice: Dice, tmp_path: Path) -> None:
    dice.killed_at = 2
    with pytest.raises(KeyboardInterrupt):
        rc_probe.experiments.run("sort", device="cpu", out=tmp_path)
    assert dice.rolled == [0, 1] and not (tmp_path / "results.json").exists()
    dice.killed_at = None
    (tmp_path / "seed-0" / "measured.json").write_text("{")  # damaged: done again
    found = rc_probe.experiments.run("sort", device="cpu", out=tmp_path, seeds=4)
    assert dice.rolled == [0, 1, 0, 2, 3]
    assert found.tables["rolls"]["value"].tolist() == [0, 0.1, 0.2, 0.3]
    again = rc_probe.experiments.run("sort", device="cpu", out=tmp_path, seeds=4)
    assert dice.rolled == [0, 1, 0, 2, 3]
    pd.testing.assert_frame_equal(again.claims, found.claims)
    kept = json.loads((tmp_path / "seed-3" / "measured.json").read_text())
    (tmp_path / "seed-3" / "measured.json").write_text(json.dumps({**kept, "seconds": 500.0}))
    assert rc_probe.experiments.run("sort", device="cpu", out=tmp_path, seeds=4).environment["seconds"] >= 500
    rc_probe.experiments.run("sort", device="cpu", out=tmp_path, quick=True)  # other sizes
    rc_probe.experiments.run("sort", device="cpu", out=tmp_path, quick=True, resume=False)
    assert dice.rolled == [0, 1, 0, 2, 3, 0, 0]


def test_a_result_comes_back(dice: Dice, tmp_path: Path) -> None:
    found = rc_probe.experiments.run("sort", device="cpu", out=tmp_path)
    again = ExperimentResult.load(tmp_path)
    assert again.to_json() == found.to_json() and again.to_html() == found.to_html()
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        "report.html",
        "results.json",
        "claims.csv",
        "rolls.csv",
    }
    assert found.settings["sizes"] == {"seeds": 3, "sides": 6}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text('{"schema": 1}')
    with pytest.raises(RcProbeError, match="not an experiment"):
        ExperimentResult.load(tmp_path / "other")


def test_the_page_has_the_claims(dice: Dice) -> None:
    page = rc_probe.experiments.run("sort", device="cpu").to_html()
    assert "<h1>Dice</h1>" in page and "rc-probe experiment sort" in page
    assert '<td class="level collapsed">no</td>' in page and '<td class="level healthy">yes</td>' in page
    assert '<td data-value="0.1">0.100 (0 to 0.200)</td>' in page


def test_the_command(run: Run, dice: Dice) -> None:
    code, out, _ = run("experiment", "sort", "--seeds", "2", "--device", "cpu")
    assert code == 0
    assert "2 of 2 claims hold with every one of 2 seeds." in out
    assert out.rstrip().endswith("Report: rc-probe-out/sort/report.html")
    saved = json.loads(Path("rc-probe-out/sort/results.json").read_text())
    assert (saved["kind"], saved["settings"]["command"]) == (
        "experiment",
        "rc-probe experiment sort --seeds 2 --device cpu",
    )
    dice.killed_at = 3
    code, _, err = run("experiment", "sort", "--seeds", "5", "--device", "cpu", "--quiet")
    assert (code, err) == (130, "rc-probe: interrupted. 3 seeds are finished; the same command goes on\n")
    code, out, _ = run("experiment", "sort", "--quick", "--json", "--quiet", "--device", "cpu")
    assert (code, json.loads(out)["settings"]["quick"]) == (0, True)
    assert Path("rc-probe-out/sort-quick/claims.csv").exists()


def test_all_are_listed(run: Run) -> None:
    code, out, _ = run("experiment", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(NAMES)
    page = (ROOT / "docs" / "experiments.md").read_text("utf-8")
    for name in NAMES:
        assert experiment(name).name == name
        assert f"`rc-probe experiment {name}`" in page
        for claim in experiment(name).claims:
            assert claim.claim in page, "docs/experiments.md goes through the claims"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no experiment is named. There are sort"),
        (["srot"], r"no experiment is called 'srot'. Did you mean sort\?"),
        (["sort", "--seeds", "0"], "--seeds: 0 is too small. Give at least 1"),
        (["sort", "--device", "abacus"], "--device: no such device 'abacus'"),
        (["sort", "--data", "nowhere.txt"], "nowhere.txt"),
        (["sort", "--out", ""], "--out: '' is no path"),
        (["sort", "--seed", "2"], r"--seed: no such option. Did you mean --seeds\?"),
    ],
)
def test_bad_input_is_one_line(run: Run, words: list[str], said: str) -> None:
    fails(run, said, "experiment", *words)


def test_only_memorize_reads_data(tmp_path: Path) -> None:
    with pytest.raises(RcProbeError, match="sort makes its own data"):
        rc_probe.experiments.run("sort", data=["a text"])
