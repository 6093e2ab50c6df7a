"""The hull experiment: its sets of points, their labels, and what can be guessed."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import rc_probe.experiments
from rc_probe.experiments.hull import EXPERIMENT, POINTS, SHIFT, SIDE, draw, guesses, hull_data, vertices
from rc_probe.experiments.labelling.data import Labelled
from rc_probe.models.own.san import SANConfig, SANForTokenClassification

SMALL = SANConfig(
    vocab_size=0, coordinates=2, deep_entry=True, hidden_size=6, num_attention_heads=3, num_hidden_layers=2,
    max_position_embeddings=0, num_labels=2,
)  # fmt: skip


def inside_a_triangle(points: np.ndarray, i: int) -> bool:
    """A point is no vertex of the hull where it lies in a triangle of three others."""

    def side(a: np.ndarray, b: np.ndarray) -> bool:
        return bool((b[0] - a[0]) * (points[i][1] - a[1]) - (b[1] - a[1]) * (points[i][0] - a[0]) > 0)

    others = [p for j, p in enumerate(points) if j != i]
    return any(side(a, b) == side(b, c) == side(c, a) for a, b, c in itertools.combinations(others, 3))


def test_labels_are_the_vertices_of_the_hull() -> None:
    points = draw(20, torch.Generator().manual_seed(0))
    found = vertices(points).tolist()
    wanted = [[int(not inside_a_triangle(one, i)) for i in range(POINTS)] for one in points.double().numpy()]
    assert found == wanted
    square = torch.tensor([[[0.0, 0], [1, 0], [1, 1], [0, 1], [0.5, 0.4]]])
    assert vertices(square).tolist() == [[1, 1, 1, 1, 0]]


def test_points_are_a_square_that_is_moved() -> None:
    points = draw(20_000, torch.Generator().manual_seed(1))
    extent = points.amax(1) - points.amin(1)
    assert extent.max() < SIDE
    assert extent.mean() == pytest.approx(SIDE * 9 / 11, rel=0.01)  # of the range of 10 uniform numbers
    middle = points.mean(1)
    assert middle.mean() == pytest.approx(SIDE / 2, abs=0.1)
    assert middle.var(0).tolist() == pytest.approx([SHIFT**2 + SIDE**2 / 120] * 2, rel=0.03)


def test_train_and_test_are_disjoint_and_the_same_for_the_same_seed() -> None:
    train, test = hull_data(300, 200, seed=3)
    rows = [{tuple(row) for row in one.inputs["points"].flatten(1).tolist()} for one in (train, test)]
    assert [len(one) for one in rows] == [300, 200] and not rows[0] & rows[1]
    again, other = hull_data(300, 200, seed=3)[0], hull_data(300, 200, seed=4)[0]
    assert torch.equal(train.inputs["points"], again.inputs["points"])
    assert not torch.equal(train.inputs["points"], other.inputs["points"])


def test_the_majority_is_known() -> None:
    """5.95 of 10 points are vertices on average."""
    generator = torch.Generator().manual_seed(0)
    fit, test = (Labelled({"points": x}, vertices(x)) for x in draw(6000, generator).split(3000))
    majority, place = guesses(fit, test).values()
    assert majority == pytest.approx(0.595, abs=0.01)
    assert majority - 0.02 < place < majority + 0.05


def test_a_network_of_points_is_measured() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            EXPERIMENT, "quick", EXPERIMENT.sizes.changed(seeds=1, epochs=1, train=60, test=9, at_once=5)
        )
        patch.setattr(EXPERIMENT, "config", lambda train: SMALL)
        patch.setattr("rc_probe.experiments.hull.MANY", 300)
        result = rc_probe.experiments.run("hull", quick=True, device="cpu")
    rows = result.tables["paths"].query("metric == 'accuracy'")
    whole = rows.query("estimator == 'full'")["mean"].item()
    assert rows.query("scope == 'up_to' and length == 2 and estimator == 'exact'")[
        "mean"
    ].item() == pytest.approx(whole)
    assert 0 <= whole <= 1 and rows["drawn"].dropna().unique().tolist() == [5, 20]
    assert "20 live paths of length 1 score more than 0.65" in result.to_html()


def test_a_saved_network_is_attached_in_python(tmp_path: Path) -> None:
    torch.manual_seed(0)
    SANForTokenClassification(SMALL).save_pretrained(tmp_path)
    model = SANForTokenClassification.from_pretrained(tmp_path).eval()
    points = draw(4, torch.Generator().manual_seed(0))
    with rc_probe.attach(model, inputs={"points": points}) as probe:
        model(points=points)
    assert probe.frame().query("metric == 'residual'")["count"].tolist() == [4] * 3
    assert probe.structure_frame()["kind"].tolist() == ["attention"] * 2


def test_the_order_of_points_does_not_matter() -> None:
    model = SANForTokenClassification(SMALL).eval().double()
    points, order = draw(2, torch.Generator().manual_seed(0)).double(), torch.randperm(POINTS)
    torch.testing.assert_close(model(points=points[:, order]).logits, model(points=points).logits[:, order])
