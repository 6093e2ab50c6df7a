"""What the rows of `paths` say of several samples or estimates together."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from support import trained

from rc_probe.data.batches import batches
from rc_probe.data.samples import load_samples
from rc_probe.hooks.attach import find_structure
from rc_probe.metrics.intervals import bootstrap, student, wilson
from rc_probe.models.load import Loaded
from rc_probe.paths.decompose import hops
from rc_probe.paths.effectiveness import Budget, effectiveness
from rc_probe.paths.effects import Effects
from rc_probe.paths.live import draw_paths, live, summed
from rc_probe.paths.sample import sample
from rc_probe.paths.summaries import over_repeats, over_samples
from rc_probe.tasks import choose_task

Rows = dict[tuple[Any, ...], dict[str, Any]]


def effects_of(loaded: Loaded, texts: list[str], batch_size: int = 4, **budget: Any) -> Effects:
    samples = load_samples(texts, modality="text", samples=100)
    task, _ = choose_task(loaded, samples)
    assert task is not None
    made = list(batches(task.samples, loaded, batch_size=batch_size))
    structure = find_structure(loaded.model, made[0].inputs)
    return effectiveness(structure, task, made, Budget(**{"paths": (), **budget}))


def by_key(effects: Effects) -> Rows:
    return {(r["estimator"], r["scope"], r["length"], r["metric"]): r for r in effects.rows}


@torch.no_grad()
def scored(loaded: Loaded, texts: list[str]) -> tuple[list[np.ndarray[Any, Any]], list[float]]:
    """Of each text: the loss of each of its tokens, float64, and the share of tokens that are right."""
    losses, accuracies = [], []
    for text in texts:
        ids = torch.tensor([[4 + int(word[1:]) for word in text.split()]])
        logits = loaded.model(input_ids=ids).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy())
        accuracies.append(float((logits.argmax(-1) == ids[0, 1:]).double().mean()))
    return losses, accuracies


def test_a_loss_is_of_tokens_and_its_interval_of_texts(trained_causal: Loaded) -> None:
    texts, _ = trained.walks(9, seed=5)
    assert len({len(text.split()) for text in texts}) > 3
    losses, accuracies = scored(trained_causal, texts)
    rows = by_key(effects_of(trained_causal, texts))
    means, tokens = [one.mean() for one in losses], [len(one) for one in losses]
    everything = float(np.concatenate(losses).mean())
    assert abs(everything - np.mean(means)) > 1e-3
    loss, accuracy = (rows["full", "full", None, metric] for metric in ("loss", "accuracy"))
    assert loss["mean"] == pytest.approx(everything, abs=2e-6)
    assert loss["std"] == pytest.approx(np.std(means, ddof=1), abs=2e-6)
    assert (loss["low"], loss["high"]) == pytest.approx(student(means, tokens), abs=5e-6)
    assert loss["low"] < everything < loss["high"]
    assert accuracy["mean"] == pytest.approx(np.mean(accuracies), abs=1e-9)  # each text weighs the same
    assert (accuracy["low"], accuracy["high"]) == pytest.approx(bootstrap(accuracies), abs=1e-9)
    whole = rows["exact", "up_to", 2, "loss"]
    assert whole["mean"] == pytest.approx(everything, abs=1e-5)


def test_no_row_leaves_its_range_and_few_samples_have_no_interval(trained_causal: Loaded) -> None:
    texts, _ = trained.walks(9, seed=5)
    for count, known in ((9, True), (7, False)):
        for key, row in by_key(effects_of(trained_causal, texts[:count])).items():
            none = key[0] == "baseline" or (key[0], key[3]) == ("full", "agreement")
            assert math.isfinite(row["low"]) == math.isfinite(row["high"]) == (known and not none), key
            if known and key[3] in ("agreement", "accuracy", "norm_share") and not none:
                assert 0 <= row["low"] <= row["mean"] <= row["high"] <= 1, key


def test_shares_of_single_predictions_are_proportions(trained_classifier: Loaded) -> None:
    texts, _ = trained.walks(13, seed=5)
    row = by_key(effects_of(trained_classifier, texts))["exact", "alone", 1, "agreement"]
    hits = round(13 * row["mean"])
    assert 0 < hits < 13 and row["mean"] == pytest.approx(hits / 13)
    assert (row["low"], row["high"]) == pytest.approx(wilson(hits, 13))


def test_the_batch_size_changes_no_interval(trained_causal: Loaded) -> None:
    texts, _ = trained.walks(9, seed=5)
    one, other = (by_key(effects_of(trained_causal, texts, size)) for size in (1, 9))
    assert one.keys() == other.keys()
    for key, row in one.items():
        for name in ("mean", "std", "low", "high"):
            assert row[name] == pytest.approx(other[key][name], abs=1e-5, nan_ok=True), (key, name)


def test_estimates_weigh_tokens_too(trained_causal: Loaded) -> None:
    """The one path of length 0 is exact, however it is estimated; five repeats have Student's interval."""
    texts, _ = trained.walks(9, seed=5)
    rows = by_key(effects_of(trained_causal, texts, paths=(2,), repeats=5))
    exact, drawn = (rows[name, "alone", 0, "loss"] for name in ("exact", "sampled"))
    assert drawn["mean"] == pytest.approx(exact["mean"], abs=1e-5)
    one = rows["sampled", "alone", 1, "loss"]
    half = 2.7764451052 * one["std"] / math.sqrt(5)
    assert one["std"] > 0
    assert (one["low"], one["high"]) == pytest.approx((max(0, one["mean"] - half), one["mean"] + half))


def test_each_estimate_is_projected_by_itself(trained_causal: Loaded) -> None:
    """<part, output> / <output, output> over real tokens, of each repeat its own draws; padded texts."""
    texts, _ = trained.walks(5, seed=5)
    rows = by_key(effects_of(trained_causal, texts, batch_size=5, paths=(2,), repeats=4))
    (batch,) = batches(load_samples(texts, modality="text"), trained_causal, batch_size=5)
    assert batch.mask is not None and not batch.mask.all()
    mask = batch.mask.numpy()
    drawn = sample(trained_causal.model, batch.inputs, paths=2, repeats=4, seed=0).parts.double().numpy()
    with torch.no_grad():
        states = trained_causal.model(**batch.inputs, output_hidden_states=True).hidden_states
    output = states[-1].double().numpy()
    for length in (1, 2):
        means = []
        for part in drawn[:, length]:
            shares = [
                (part[i][mask[i]] * output[i][mask[i]]).sum() / (output[i][mask[i]] ** 2).sum()
                for i in range(5)
            ]
            means.append(float(np.mean(shares)))
        row = rows["sampled", "alone", length, "projection"]
        assert row["mean"] == pytest.approx(np.mean(means), abs=1e-6)
        assert row["std"] == pytest.approx(np.std(means, ddof=1), rel=1e-4) and row["std"] > 1e-4


def test_each_live_estimate_is_scored_by_itself(trained_causal: Loaded) -> None:
    """Losses of real tokens, in float64, from the streams of each repeat's own paths through the model's own head."""
    texts, _ = trained.walks(5, seed=5)
    rows = by_key(effects_of(trained_causal, texts, batch_size=5, paths=(2,), repeats=4))
    (batch,) = batches(load_samples(texts, modality="text"), trained_causal, batch_size=5)
    assert batch.mask is not None
    model, choices = trained_causal.model, hops(find_structure(trained_causal.model, batch.inputs))
    generator, lengths = torch.Generator().manual_seed(0), range(len(choices) + 1)
    drawn = [draw_paths(choices, k, 2, generator) for _ in range(4) for k in lengths]
    ids, real = batch.inputs["input_ids"][:, 1:], batch.mask[:, 1:]
    found: dict[int, list[float]] = {k: [] for k in lengths}
    for k, paths in zip([*lengths] * 4, drawn, strict=True):
        with torch.no_grad():
            stream = summed(live(find_structure(model, batch.inputs), batch.inputs, paths))
            words = model.lm_head(model.transformer.ln_f(stream))[:, :-1].double().log_softmax(-1)
        found[k].append(float(-words.gather(-1, ids[..., None])[..., 0][real].mean()))
    for k in (1, 2):
        row = rows["live", "alone", k, "loss"]
        assert row["mean"] == pytest.approx(np.mean(found[k]), abs=1e-5)
        assert row["std"] == pytest.approx(np.std(found[k], ddof=1), abs=1e-5) and row["std"] > 1e-3


def test_by_hand() -> None:
    repeats = over_repeats(torch.tensor([1.0, 2, 3, 4, 5]).double(), "loss")
    assert repeats == pytest.approx({"mean": 3, "std": 1.5811, "low": 1.0368, "high": 4.9632}, abs=5e-5)
    near_one = over_repeats(torch.tensor([1.0, 0.9, 1, 0.8, 1]).double(), "agreement")
    assert near_one["high"] == 1 and 0.8 < near_one["low"] < near_one["mean"] == pytest.approx(0.94)
    ones = torch.ones(16, dtype=torch.float64)
    share = over_samples(torch.cat([ones[:15], torch.zeros(1)]), "agreement", ones)
    assert (share["mean"], share["low"], share["high"]) == pytest.approx((0.9375, 0.7167, 0.9889), abs=5e-5)
    few = over_samples(torch.tensor([1.0, 3.0]).double(), "loss", torch.tensor([3.0, 1.0]).double())
    assert (few["mean"], few["std"]) == (1.5, pytest.approx(math.sqrt(2)))
    assert math.isnan(few["low"]) and math.isnan(few["high"])
    assert all(math.isnan(over_samples(ones[:1], "loss")[name]) for name in ("std", "low", "high"))
