"""The sorting experiment: its data, its baselines, the network, and the paper's paths through it."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from support import reference_san as reference
from support.sorting import Trained, train_sorting

import rc_probe.experiments
from rc_probe import RcProbeError
from rc_probe.experiments.labelling.data import Labelled, accuracy
from rc_probe.experiments.sort import EXPERIMENT, LETTERS, SEQUENCE, draw, guesses, labelled, sorting_data
from rc_probe.experiments.training import Trainer
from rc_probe.hooks.attach import find_structure
from rc_probe.models.own.san import SANConfig, SANForTokenClassification

SMALL = SANConfig(hidden_size=8, num_hidden_layers=2, num_labels=10)


def in_float64(trained: Trained) -> SANForTokenClassification:
    return copy.deepcopy(trained.model).double()


# ---- data


def test_labels_are_the_sorted_letters() -> None:
    train, test = sorting_data()
    assert train.inputs["input_ids"].shape == (1000, SEQUENCE)
    assert test.inputs["input_ids"].shape == (200, SEQUENCE)
    for inputs, labels in ((one.inputs["input_ids"], one.labels) for one in (train, test)):
        assert labels.tolist() == [sorted(row) for row in inputs.tolist()]
        assert set(inputs.flatten().tolist()) == set(range(LETTERS))


def test_no_test_sequence_is_trained_on() -> None:
    # So many that without care about ten sequences would be in both sets.
    train, test = (one.inputs["input_ids"] for one in sorting_data(train=20_000, test=50_000, seed=1))
    assert not {*map(tuple, train.tolist())} & {*map(tuple, test.tolist())}
    assert len(train) == 20_000


def test_the_seed_decides_the_data() -> None:
    one, same, other = (sorting_data(seed=seed)[0].inputs["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


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
    chance, constant, own = guesses(*(labelled(draw(50_000, generator)) for _ in range(2))).values()
    assert chance == 0.1
    assert constant == pytest.approx(best_letter(), abs=0.005)
    assert own == pytest.approx(best_own_letter(), abs=0.005)


def test_baselines_know_nothing_of_the_test_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    fit, test = (labelled(draw(2000, generator)) for _ in range(2))
    shuffled = Labelled(test.inputs, test.labels[torch.randperm(2000, generator=generator)])
    _, constant, own = guesses(fit, shuffled).values()
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


def test_a_mask_leaves_padding_out() -> None:
    torch.manual_seed(0)
    model = SANForTokenClassification(SMALL).eval().double()
    ids, mask = torch.tensor([[4, 7, 1, 9, 9]]), torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(model(ids, mask).logits[:, :3], model(ids[:, :3]).logits)


def test_without_its_skip_attention_goes_on_alone() -> None:
    config = SANConfig(**{**SMALL.to_dict(), "num_hidden_layers": 1, "skip": False})
    model, ids = SANForTokenClassification(config).eval().double(), torch.tensor([[4, 7, 1]])
    for parameter in model.parameters():
        parameter.data.normal_()
    san, block, h = model.san, model.san.blocks[0], reference.embedded(model, ids)
    heads = sum(reference.head(block.attention, h, i) for i in range(2)) + block.attention.output.bias
    wanted = reference.plain_norm(heads, 1e-12) * block.attention_norm.weight + block.attention_norm.bias
    torch.testing.assert_close(san(ids).last_hidden_state, wanted)


def test_without_positions_the_model_sorts_as_it_is_told() -> None:
    config = SANConfig(**{**SMALL.to_dict(), "max_position_embeddings": 0})
    model, order = SANForTokenClassification(config).eval().double(), torch.tensor([3, 1, 0, 2])
    ids = torch.tensor([[4, 7, 1, 9]])
    torch.testing.assert_close(model(ids[:, order]).logits, model(ids).logits[:, order])


# ---- training


def test_training_is_repeatable_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    seen: list[tuple[str, int, int]] = []
    one = train_sorting(0, SMALL, Trainer("cpu", lambda *said: seen.append(said)), epochs=2, train=60)
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == [("training", 4, 4)]
    torch.manual_seed(99)
    two, other = (train_sorting(seed, SMALL, epochs=2, train=60) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert not torch.equal(one.model.classifier.weight, other.model.classifier.weight)
    assert not one.model.training


def test_a_rate_that_is_too_large_is_an_error() -> None:
    with pytest.raises(RcProbeError, match=r"the loss is (nan|inf) with a learning rate of"):
        train_sorting(0, SMALL, epochs=1, train=60, recipe=EXPERIMENT.sizes.recipe.__class__(lr=1e36))


def test_the_entire_model_sorts(sorting_san: Trained) -> None:
    with torch.no_grad():
        logits = reference.entire(sorting_san.model, sorting_san.inputs)
    assert accuracy(logits, sorting_san.labels) > 0.95


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


def test_the_model_is_made_whatever_of_transformers_was_imported_before() -> None:
    """`transformers.initialization` is not there for everybody who imports transformers."""
    code = (
        "from transformers.models.gpt2.modeling_gpt2 import GPT2Model\n"
        "from rc_probe.models.own.san import SANConfig, SANForTokenClassification\n"
        "SANForTokenClassification(SANConfig(hidden_size=8, num_hidden_layers=1))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the experiment


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seed of a tiny network, measured and saved."""
    home = tmp_path_factory.mktemp("sort")
    sizes = EXPERIMENT.sizes.changed(seeds=1, epochs=1, train=30, test=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EXPERIMENT, "quick", sizes)
        patch.setattr(EXPERIMENT, "config", lambda train: SMALL)
        rc_probe.experiments.run("sort", quick=True, device="cpu", out=home)
    return home


def test_accuracies_are_those_of_the_network(found: Path) -> None:
    result = rc_probe.experiments.ExperimentResult.load(found)
    model = SANForTokenClassification.from_pretrained(found / "seed-0" / "model").eval()
    _, test = sorting_data(30, 12, seed=0)
    ids = test.inputs["input_ids"]
    with torch.no_grad():
        entire = accuracy(reference.entire(model, ids), test.labels)
        nothing = accuracy(reference.together(model, ids, [[2, 2]]), test.labels)
    rows = result.tables["paths"].query("metric == 'accuracy'")
    assert rows.query("estimator == 'full'")["mean"].tolist() == [pytest.approx(entire)]
    assert rows.query("estimator == 'exact' and scope == 'up_to' and length == 2")["mean"].tolist() == [
        pytest.approx(entire)
    ]
    live = rows.query("estimator == 'live' and length == 0")
    assert live["drawn"].tolist() == [5, 20] and live["mean"].tolist() == [pytest.approx(nothing)] * 2
    assert result.claims.loc[0, ["measured", "low", "high"]].tolist() == [pytest.approx(entire)] * 3
    assert result.claims.loc[0, "seeds"] == 1 and not result.claims.loc[0, "holds"]


def test_the_folder_is_a_model_like_any_other(found: Path) -> None:
    """Its texts are the test sequences, its tokens the letters."""
    texts = (found / "seed-0" / "texts.txt").read_text().splitlines()
    _, test = sorting_data(30, 12, seed=0)
    assert texts == [" ".join("abcdefghij"[i] for i in row) for row in test.inputs["input_ids"].tolist()]
    result = rc_probe.probe(str(found / "seed-0" / "model"), texts, init=False, metrics=("residual",))
    assert result.settings["tokens"] == 12 * SEQUENCE
    assert result.model["class"] == "SANForTokenClassification"
    assert result.model["paths"]["task"] == "token classification"


@pytest.mark.parametrize("labels", [2, 3])
def test_a_config_comes_back(tmp_path: Path, labels: int) -> None:
    """transformers does not write a number of labels that is its own default."""
    config = SANConfig(hidden_size=8, vocab_size=0, coordinates=2, skip=False, num_labels=labels)
    config.save_pretrained(tmp_path)
    again = SANConfig.from_pretrained(tmp_path)
    assert (again.num_labels, again.coordinates, again.skip, again.deep_entry) == (labels, 2, False, False)
