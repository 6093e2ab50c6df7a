"""The circle experiment: its points, its four arms, and networks that are fed their own answers."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rc_probe.experiments
from rc_probe.experiments import ExperimentResult
from rc_probe.experiments.circle import ARMS, EXPERIMENT, TRAININGS, circle, config, fed_by_itself
from rc_probe.hooks.attach import find_structure
from rc_probe.models.own.san import SANForTokenClassification


def test_targets_are_the_next_points() -> None:
    inputs, targets = circle()
    assert inputs.shape == targets.shape == (499, 2, 2)
    assert torch.linalg.norm(inputs, dim=-1).sub(0.3).abs().max() < 1e-6
    for data, ahead in ((inputs, 0), (targets, 1)):
        for example, token in ((0, 0), (0, 1), (498, 1)):
            turn = 2 * math.pi * (example + 499 * token + ahead) / 1000
            assert data[example, token].tolist() == pytest.approx(
                [0.3 * math.cos(turn), 0.3 * math.sin(turn)], abs=1e-6
            )


def test_arms_differ_in_skip_and_mlp_alone() -> None:
    models = {}
    for arm in ARMS:
        torch.manual_seed(0)
        models[arm] = SANForTokenClassification(config(8, arm, 0.0)).eval()
    weights = {arm: model.state_dict() for arm, model in models.items()}
    for one, other in (("pure", "skip"), ("MLP", "skip and MLP"), ("pure", "MLP")):
        assert weights[one].keys() <= weights[other].keys()
        assert one == "pure" or weights[one].keys() == weights[other].keys()
    for one, other in (("pure", "skip"), ("MLP", "skip and MLP")):
        assert all(torch.equal(value, weights[other][name]) for name, value in weights[one].items())
    points = {
        "points": circle()[0][:6].reshape(4, 3, 2)
    }  # proofs are on two samples, and two tokens would look alike
    assert find_structure(models["skip"], points).signature == "An"
    assert find_structure(models["skip and MLP"], points).signature == "An|Mn"


def test_a_network_is_fed_its_own_answers() -> None:
    """One that turns every point by a tenth of a circle."""

    class Turn:
        def __call__(self, points: Tensor) -> object:
            turn = torch.tensor(0.2 * math.pi)
            matrix = torch.stack([turn.cos(), turn.sin(), -turn.sin(), turn.cos()]).view(2, 2)
            return type("Output", (), {"logits": points @ matrix})

    start = torch.tensor([[0.3, 0.0], [0.0, 0.2]])
    ways = list(fed_by_itself(Turn(), start, 10))  # type: ignore[arg-type]
    assert len(ways) == 11
    assert ways[5].flatten().tolist() == pytest.approx([-0.3, 0, 0, -0.2], abs=1e-6)
    assert ways[10].flatten().tolist() == pytest.approx(start.flatten().tolist(), abs=1e-6)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExperimentResult, Path]:
    home = tmp_path_factory.mktemp("circle")
    with pytest.MonkeyPatch.context() as patch:
        short = tuple(replace(training, epochs=1) for training in TRAININGS)
        quick = EXPERIMENT.quick.changed(seeds=1, widths=(4,), trainings=short, steps=30)
        patch.setattr(EXPERIMENT, "quick", quick)
        return rc_probe.experiments.run("circle", quick=True, device="cpu", out=home), home


def test_every_width_and_arm_is_followed(found: tuple[ExperimentResult, Path]) -> None:
    result, home = found
    ways, fits = result.tables["trajectories"], result.tables["fits"]
    assert len(fits) == 2 * 4 and len(ways) == len(fits) * (21 + 1)
    assert ways.loc[ways["step"] == 0, "distance"].tolist() == pytest.approx([0.6] * 8, abs=1e-5)
    wanted = ((ways["x1"] - ways["x2"]) ** 2 + (ways["y1"] - ways["y2"]) ** 2) ** 0.5
    assert (ways["distance"] - wanted).abs().max() < 1e-12
    model = SANForTokenClassification.from_pretrained(home / "seed-0" / "width-4-long-skip-and-MLP").eval()
    inputs, targets = circle()
    with torch.no_grad():
        answers = model(points=inputs).logits
    error = float((answers - targets).square().sum(-1).mean())
    mine = fits.query("training == 'long' and arm == 'skip and MLP'")["error"].item()
    assert mine == pytest.approx(error, rel=1e-5)
    first = ways.query("training == 'long' and arm == 'skip and MLP' and step == 1").iloc[0]
    assert first[["x1", "y1", "x2", "y2"]].tolist() == pytest.approx(answers[0].flatten().tolist(), abs=1e-6)


def test_the_page_has_small_multiples(found: tuple[ExperimentResult, Path]) -> None:
    page = found[0].to_html()
    for arm in ARMS:
        assert page.count(f"4: {arm}. the tokens are") == 2
    assert "width 4, short training. pure: " in page
