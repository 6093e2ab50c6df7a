"""The nearest-neighbour experiment: targets, heads by hand, the plateau, truncation."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import rc_probe.experiments
from rc_probe.experiments import nearest
from rc_probe.experiments.nearest import EXPERIMENT, FULL, deep, error_of, facts, single, truncations
from rc_probe.experiments.nearest_networks import (
    FARTHEST,
    Encoder,
    Heads,
    Points,
    Task,
    draw,
    plateau,
    squared_error,
)
from rc_probe.experiments.protocol import SeedRun
from rc_probe.experiments.training import Trainer

RUN = SeedRun(0, EXPERIMENT.quick, Trainer("cpu"))


def drawn(**task: object) -> Points:
    return draw(Task(1, 1, **task), 300, torch.Generator().manual_seed(0))  # type: ignore[arg-type]


def test_answers_are_the_nearest_and_the_farthest() -> None:
    near = drawn(points="uniform", count=5)
    assert [x.shape for x in near] == [(300, 1, 16), (300, 5, 16), (300, 1, 16)]
    far = drawn(target=FARTHEST, points="uniform", count=5)
    for data, best in ((near, np.argmin), (far, np.argmax)):
        queries, points, answers = (x.numpy() for x in data)
        distances = np.linalg.norm(queries[:, :, None] - points[:, None], axis=-1)
        wanted = np.take_along_axis(points, best(distances, axis=2)[..., None], axis=1)
        assert np.array_equal(answers, wanted)
    assert torch.equal(far.queries, far.points)


def test_points_are_drawn_as_they_are_called() -> None:
    for kind in ("uniform", "orthogonal", "doubled"):
        points = drawn(target=FARTHEST, points=kind, count=8).points.double()
        gram = points @ points.mT
        assert torch.diagonal(gram, dim1=1, dim2=2).sub(1).abs().max() < 1e-6
        rest = gram - torch.eye(8)
        if kind == "orthogonal":
            assert rest.abs().max() < 1e-5
        elif kind == "doubled":
            assert torch.equal(points[:, 4:], -points[:, :4])
            assert torch.equal(
                drawn(target=FARTHEST, points=kind, count=8).answers[:, 0].double(), points[:, 4]
            )
        else:
            assert rest[:, 0, 1].var() == pytest.approx(1 / 16, rel=0.2)


def test_heads_by_hand() -> None:
    torch.manual_seed(0)
    heads = Heads(6, 2, 3).double()
    y, x = torch.randn(2, 4, 6).double(), torch.randn(2, 5, 6).double()
    wanted = torch.zeros(2, 4, 6).double()
    for q, k, v in zip(heads.query, heads.key, heads.value, strict=True):
        wanted += ((y @ q.T) @ (x @ k.T).mT / math.sqrt(2)).softmax(-1) @ x @ v
    torch.testing.assert_close(heads(y, x), wanted)
    assert Task(2, 3, dim=6).parameters == heads.query.numel() + heads.key.numel() == 72


def test_an_encoder_by_hand() -> None:
    torch.manual_seed(0)
    model = Encoder(Task(2, 2, FARTHEST, "uniform", dim=4, count=3, layers=2, scratch=2)).double()
    points = torch.randn(2, 3, 4).double()
    x = torch.cat([points, model.positions.expand(2, 3, 2)], -1)
    for i in range(2):
        for j, branch in enumerate(
            (model.heads[i], nn.Sequential(model.wide[i], nn.ReLU(), model.narrow[i]))
        ):
            x = x + (branch(x, x) if j == 0 else branch(x))
            x = model.scales[i, j] * x / x.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(model(points, points), model.out(x))


def test_the_plateau_is_that_of_the_best_linear_answer() -> None:
    """By least squares on many queries: the answer ½ (x₁ + x₂) + ½ s (x₁ − x₂), s a multiple of ⟨y, x₁ − x₂⟩."""
    assert [round(plateau(d), 4) for d in (4, 8, 16, 32, 64)] == [0.1397, 0.1612, 0.1716, 0.1767, 0.1792]
    y, x, answers = (part.double() for part in draw(Task(1, 1), 40_000, torch.Generator().manual_seed(1)))
    side = (y @ (x[:, :1] - x[:, 1:]).mT)[:, 0, 0]
    sign = side.sign()
    slope = float((side * sign).sum() / (side * side).sum())
    error = 0.5 * float(
        (sign - slope * side).square().mean()
    )  # ‖½ (sign − slope side) (x₁ − x₂)‖², and ‖x₁ − x₂‖² = 2
    assert error == pytest.approx(plateau(16), abs=0.004)
    halves = answers[:, 0] - x.mean(1)
    assert torch.allclose(halves, 0.5 * sign[:, None] * (x[:, 0] - x[:, 1]))


def test_a_perfect_head_and_its_truncation() -> None:
    """Q = K = c I with c large answers right; without any rank it says the mean, which is 0.5 off."""
    head = Heads(16, 16, 1)
    with torch.no_grad():
        for part in (head.query, head.key):
            part[0] = 100 * torch.eye(16)
        head.value[0] = torch.eye(16)
    assert error_of(head, FULL, RUN) < 1e-3
    found = {row["rank"]: row["error"] for row in truncations(head, RUN)}
    assert list(found) == list(range(17))
    assert found[16] < 1e-3 and found[0] == pytest.approx(0.5)
    assert (
        0.25 < found[8] < 0.6
    )  # half of the dimensions decide: wrong nearly as often as right answers are far
    values = {row["quantity"]: row["value"] for row in facts(head)}
    assert values == pytest.approx({"cosine": 1, "ratio": 1, "effective_rank": 16})


def test_silence_is_one_off() -> None:
    model = Heads(16, 4, 2)
    nn.init.zeros_(model.value)
    data = drawn(target=FARTHEST, points="uniform", count=6)
    assert float(squared_error(model, data).detach()) == pytest.approx(1, abs=1e-5)


def test_networks_have_equal_parameters_where_it_is_said() -> None:
    tasks = single(EXPERIMENT.sizes)
    assert [(t.rank, t.heads, t.parameters) for t in tasks[:5]] == [
        (r, 16 // r, 512) for r in (1, 2, 4, 8, 16)
    ]
    assert all(t.parameters == 512 for t in deep(EXPERIMENT.sizes) if not t.scratch)
    assert len(set(tasks)) == len(tasks) and tasks.count(FULL) == 1


def test_training_is_repeatable_and_tests_on_other_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "TEST", 500)
    sizes = EXPERIMENT.sizes.changed(seeds=1, steps=3, deep=2, batch=16, contexts=(4, 5, 6), depths=(1, 2))
    monkeypatch.setattr(EXPERIMENT, "quick", sizes)
    one, two = (rc_probe.experiments.run("nearest", quick=True, device="cpu") for _ in range(2))
    assert one.tables["errors"].equals(two.tables["errors"])
    assert one.tables["errors"]["error"].between(0, 100).all()
    assert len(one.tables["errors"]) == len(single(sizes)) + len(deep(sizes))
    page = one.to_html()
    assert "the plateau of d = 16 is 0.172" in page and "By number of points" in page
