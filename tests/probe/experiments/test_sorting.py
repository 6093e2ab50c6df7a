"""The sorting experiment: the model, its data, its baselines, and the paper's paths through it."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from support import reference_san as reference
from typer.testing import CliRunner

from rc_probe import RcProbeError
from rc_probe.experiments.san import SANConfig, SANForTokenClassification
from rc_probe.experiments.sorting import (
    LETTERS,
    SEQUENCE,
    Sorting,
    Trained,
    accuracy,
    app,
    baselines,
    draw,
    entire,
    sorting_data,
    train_sorting,
)
from rc_probe.hooks.attach import find_structure

SMALL = SANConfig(hidden_size=8, num_hidden_layers=2)


def in_float64(trained: Trained) -> SANForTokenClassification:
    return copy.deepcopy(trained.model).double()


# ---- data


def test_labels_are_the_sorted_letters() -> None:
    train, test = sorting_data()
    assert train.inputs.shape == (1000, SEQUENCE)
    assert test.inputs.shape == (200, SEQUENCE)
    for inputs, labels in (train, test):
        assert labels.tolist() == [sorted(row) for row in inputs.tolist()]
        assert set(inputs.flatten().tolist()) == set(range(LETTERS))


@pytest.mark.parametrize("seed", range(3))
def test_no_test_sequence_is_trained_on(seed: int) -> None:
    # So many that without care about ten sequences would be in both sets.
    train, test = sorting_data(train=20_000, test=50_000, seed=seed)
    assert not {*map(tuple, train.inputs.tolist())} & {*map(tuple, test.inputs.tolist())}
    assert len(train.inputs) == len(train.labels) == 20_000
    assert torch.equal(train.labels, train.inputs.sort(1).values)


def test_the_seed_decides_the_data() -> None:
    one, same, other = sorting_data(seed=0), sorting_data(seed=0), sorting_data(seed=1)
    assert torch.equal(one[0].inputs, same[0].inputs) and torch.equal(one[1].inputs, same[1].inputs)
    assert not torch.equal(one[0].inputs, other[0].inputs)


# ---- baselines


def best_letter() -> float:
    """Accuracy of the commonest letter at each position, from the law of order statistics."""
    at_most = np.array(
        [[stats.binom.sf(j, SEQUENCE, (m + 1) / LETTERS) for m in range(LETTERS)] for j in range(SEQUENCE)]
    )
    return float(np.diff(at_most, axis=1, prepend=0).max(1).mean())


def best_own_letter() -> float:
    """The same where the letter that stands at the position is known; the other seven are random."""
    best = [
        max(np.diff([stats.binom.sf(j - (c <= m), SEQUENCE - 1, (m + 1) / LETTERS) for m in range(LETTERS)], prepend=0))
        for j in range(SEQUENCE)
        for c in range(LETTERS)
    ]  # fmt: skip
    return float(np.mean(best))


def test_baselines_are_those_of_order_statistics() -> None:
    assert best_letter() == pytest.approx(0.339, abs=0.001)
    assert best_own_letter() == pytest.approx(0.387, abs=0.001)
    generator = torch.Generator().manual_seed(0)
    chance, constant, own = (line.value for line in baselines(*(draw(50_000, generator) for _ in range(2))))
    assert chance == 0.1
    assert constant == pytest.approx(best_letter(), abs=0.005)
    assert own == pytest.approx(best_own_letter(), abs=0.005)


def test_baselines_know_nothing_of_the_test_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    fit, test = draw(2000, generator), draw(2000, generator)
    shuffled = Sorting(test.inputs, test.labels[torch.randperm(2000, generator=generator)])
    constant, own = (line.value for line in baselines(fit, shuffled)[1:])
    assert constant == pytest.approx(best_letter(), abs=0.015)
    assert own < constant  # the letter at hand says nothing about the labels of another sequence


# ---- model


def test_the_model_is_what_its_equations_say(sorting_san: Trained) -> None:
    model = in_float64(sorting_san)
    with torch.no_grad():
        found = model(sorting_san.inputs).logits
        torch.testing.assert_close(found, reference.entire(model, sorting_san.inputs), rtol=0, atol=1e-11)


def test_a_mlp_adds_its_branch_and_norm() -> None:
    assert find_structure(SANForTokenClassification(SMALL).eval()).signature == "An"
    config = SANConfig(**{**SMALL.to_dict(), "intermediate_size": 12})
    assert find_structure(SANForTokenClassification(config).eval()).signature == "An|Mn"


def test_initial_weights_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    model = SANForTokenClassification(SANConfig(hidden_size=256, num_hidden_layers=1)).requires_grad_(False)
    attention = model.san.blocks[0].attention
    for wide in (attention.value, attention.output):
        assert wide.weight.abs().max() == pytest.approx(1 / 16, rel=1e-3)
        assert wide.weight.std() == pytest.approx(1 / 16 / 3**0.5, rel=0.02)
        assert not wide.bias.any()
    for narrow in (attention.query, attention.key, model.san.project, model.san.words):
        assert narrow.weight.std() == pytest.approx(0.02, rel=0.1)
    assert model.san.words.weight[0].any(), "letter 0 has an embedding"


def test_a_saved_model_comes_back(tmp_path: object) -> None:
    torch.manual_seed(0)
    model, ids = SANForTokenClassification(SMALL).eval(), torch.arange(SEQUENCE)[None]
    model.save_pretrained(tmp_path)
    again = SANForTokenClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_without_positions_the_model_sorts_as_it_is_told() -> None:
    config = SANConfig(**{**SMALL.to_dict(), "max_position_embeddings": 0})
    model, order = SANForTokenClassification(config).eval().double(), torch.tensor([3, 1, 0, 2])
    ids = torch.tensor([[4, 7, 1, 9]])
    torch.testing.assert_close(model(ids[:, order]).logits, model(ids).logits[:, order])


# ---- training


def test_training_is_repeatable_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    losses: list[float] = []
    one = train_sorting(0, epochs=2, train=60, config=SMALL, done=lambda epoch, loss: losses.append(loss))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    two = train_sorting(0, epochs=2, train=60, config=SMALL)
    other = train_sorting(1, epochs=2, train=60, config=SMALL)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert not torch.equal(one.model.classifier.weight, other.model.classifier.weight)
    assert not one.model.training
    assert losses[1] < losses[0] < 2.5


def test_too_small_a_model_is_refused() -> None:
    with pytest.raises(RcProbeError, match="10 tokens, 10 labels and 8 positions"):
        train_sorting(config=SANConfig(max_position_embeddings=7))


def test_the_entire_model_sorts(sorting_san: Trained) -> None:
    (line,) = entire(sorting_san)
    assert line.value > 0.95
    with torch.no_grad():
        logits = reference.entire(sorting_san.model, sorting_san.inputs)
    assert line.value == pytest.approx(accuracy(logits, sorting_san.labels), abs=0.001)


# ---- the paper's paths


def lengths(trained: Trained, count: int, repeats: int = 5) -> list[float]:
    """Mean accuracy of `count` random paths together, by length."""
    rng = np.random.default_rng(0)
    L, H = trained.model.config.num_hidden_layers, trained.model.config.num_attention_heads
    with torch.no_grad():
        return [
            float(np.mean([
                accuracy(reference.together(trained.model, trained.inputs, reference.draw_paths(L, H, k, count, rng)), trained.labels)
                for _ in range(repeats)
            ]))
            for k in range(L + 1)
        ]  # fmt: skip


def test_short_paths_sort_and_long_ones_guess(sorting_san: Trained) -> None:
    """The finding of the paper's figure: about .6 with one head on the path, chance from three on."""
    found = lengths(sorting_san, count=20)
    assert found[1] > 0.55
    assert max(found[3:]) < 0.2
    assert np.mean(found[3:]) == pytest.approx(0.1, abs=0.03)
    assert found[1] > max(found[0], *found[2:]) + 0.1


def test_paths_have_their_length_and_every_path_is_drawn() -> None:
    paths = reference.draw_paths(3, 2, 2, 500, np.random.default_rng(0))
    assert ((paths != 2).sum(1) == 2).all()
    assert len({*map(tuple, paths.tolist())}) == 3 * 4


def test_one_path_by_hand() -> None:
    """One token: its pattern is 1, so a hop is a map and a norm."""
    torch.manual_seed(0)
    model, ids = SANForTokenClassification(SMALL).eval().double(), torch.tensor([[7]])
    for parameter in model.parameters():
        parameter.data.normal_()
    h = model.san.norm(model.san.project(model.san.words.weight[7] + model.san.positions.weight[0]))
    second = model.san.blocks[1].attention
    v = second.value.weight[4:] @ h + second.value.bias[4:]  # head 1 of 2, 4 of 8 wide
    y = second.output.weight[:, 4:] @ v + second.output.bias
    wanted = (y - y.mean()) / y.std(unbiased=False)
    torch.testing.assert_close(reference.walk(model, ids, [2, 1])[0, 0], wanted)
    both = (wanted + h - (wanted + h).mean()) / (wanted + h).std(unbiased=False)
    logits = reference.together(model, ids, [[2, 1], [2, 2]])[0, 0]
    torch.testing.assert_close(logits, model.classifier(both))


def test_the_command_prints_a_table() -> None:
    found = CliRunner().invoke(app, ["--epochs", "0"])
    assert found.exit_code == 0
    ways = ["length {}, exact", "length {}, sampled", "length {}, live, 20 paths", "lengths up to {}, exact"]
    names = ["entire model", *(way.format(k) for k in range(7) for way in ways)]
    names += ["chance", "best letter of the position", "best of position and letter"]
    lines = found.stdout.splitlines()[1:]
    assert [line[:32].strip() for line in lines] == names
    assert all(0 <= float(line[32:].split()[0]) < 0.6 for line in lines)
    assert CliRunner().invoke(app, ["--epochs", "-1"]).exit_code == 2


def test_the_model_is_made_whatever_of_transformers_was_imported_before() -> None:
    """`transformers.initialization` is not there for everybody who imports transformers."""
    code = (
        "from transformers.models.gpt2.modeling_gpt2 import GPT2Model\n"
        "from rc_probe.experiments.san import SANConfig, SANForTokenClassification\n"
        "SANForTokenClassification(SANConfig(hidden_size=8, num_hidden_layers=1))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
