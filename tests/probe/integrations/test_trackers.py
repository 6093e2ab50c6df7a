"""`--log-with`: what a tracker shows is what the tables hold."""

import re
from pathlib import Path

import pytest

from rc_probe.cli.app import main
from rc_probe.integrations.trackers import plain
from rc_probe.result import ProbeResult

RUN = ["demo", "--samples", "3", "--no-init", "--no-recursion", "--quiet", "--ablate", "head@2:5"]


def test_tensorboard_has_every_curve_by_layer(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main_returns([*RUN, "--out", str(tmp_path), "--log-with", "tensorboard"])
    result = ProbeResult.load(tmp_path)
    (file,) = (tmp_path / "rc-probe").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    residuals = result.tables["residuals"]
    wanted = {
        plain("/".join(names))
        for names in zip(*(residuals[key] for key in ("metric", "weights", "variant")), strict=True)
    }
    shown = set(events.Tags()["scalars"])
    assert {name for name in shown if not name.startswith("verdict/")} == wanted
    assert "residual/pretrained/head-2:5" in wanted
    curve = residuals.query("metric == 'residual' and variant == 'SAN+MLP'").sort_values("layer")
    found = [(e.step, e.value) for e in events.Scalars("residual/pretrained/SAN-MLP")]
    assert [step for step, _ in found] == list(range(7))
    assert [value for _, value in found] == pytest.approx(curve["mean"].tolist(), rel=1e-6)
    (value,) = events.Scalars("verdict/value")
    assert (value.step, value.value) == (0, pytest.approx(result.verdict["value"]))
    (settings,) = tmp_path.rglob("hparams.yml")
    assert re.search(r"model_id: all-MiniLM-L6-v2", settings.read_text())


def main_returns(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("name", "why"), [("tensorbord", "no such tracker"), ("aim", "its package is missing")]
)
def test_trackers_that_are_not_there_are_told_first(
    name: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*RUN, "--out", str(tmp_path / "out"), "--log-with", name])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"--log-with {name}: {why}" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
