"""Paths: every one of them adds up to the decomposition; samples of them estimate it; live ones are the paper's."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from support import reference_san, trained, zoo
from support.sorting import Trained
from torch import Tensor

from rc_probe import paths
from rc_probe.data.batches import batches
from rc_probe.data.samples import load_samples
from rc_probe.experiments.labelling.data import accuracy
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.model_head import ModelHead
from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.frozen.frozen_pass import steps
from rc_probe.hooks.frozen.head_choice import kept_heads
from rc_probe.hooks.frozen.parts import Ledger, Parts, Unknown
from rc_probe.hooks.structure.structure import AttentionOp
from rc_probe.models.load import Loaded
from rc_probe.paths.effectiveness import Budget, effectiveness
from rc_probe.paths.effects import Effects
from rc_probe.paths.live import summed
from rc_probe.paths.summaries import over_repeats
from rc_probe.processes.world import World
from rc_probe.tasks import choose_task

sampling, living = import_module("rc_probe.paths.sample"), import_module("rc_probe.paths.live")

# Every way in which heads are told apart: by the library's interface, by scaled_dot_product_attention, by a softmax.
FAMILIES = [
    "bert", "albert", "gpt2", "gpt_neox", "llama", "mixtral", "falcon", "falcon_new", "xlnet", "deberta_v2", "mpnet",
    "bloom", "gptj", "vit", "beit", "swin", "opt_post_norm", "t5_encoder", "gemma2",
]  # fmt: skip


def every_path(heads: list[int]) -> Tensor:
    return torch.tensor(list(itertools.product(*(range(h + 1) for h in heads))))


def tolerance(name: str) -> float:
    return 2e-6 if name in {"llama", "mixtral", "t5_encoder", "gemma2"} else 1e-12


def built(name: str, **options: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    dtype = torch.float64 if torch.float64 in zoo.ZOO[name].dtypes else torch.float32
    model, inputs = zoo.build(name, dtype=dtype, **options)
    return model, find_structure(model, inputs), inputs


@cache
def small() -> tuple[Any, dict[str, Tensor]]:
    """A GPT-2 of 3 blocks with 4 heads, and 2 texts of 4 tokens."""
    _, structure, inputs = kept = built("gpt2", length=4)
    _KEPT.append(kept)  # a structure alone keeps no model alive
    return structure, inputs


_KEPT: list[Any] = []


def close(found: Tensor, wanted: Tensor, size: Tensor | float, limit: float = 1e-12) -> None:
    size = float(size.abs().max()) if isinstance(size, Tensor) else size
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= limit * size


# ---- terms


@pytest.mark.parametrize("name", FAMILIES)
def test_all_paths_one_by_one_are_the_decomposition(name: str) -> None:
    _, structure, inputs = built(name, length=6, padded=True)
    heads = [step.heads for step in steps(structure)]
    assert all(h > 1 for h in heads)
    every = every_path(heads)
    terms = torch.cat([paths.terms(structure, inputs, some) for some in every.split(64)])
    whole = paths.decompose(structure, inputs)
    lengths = (every > 0).sum(1)
    for k in range(whole.most + 1):
        close(terms[lengths == k].sum(0), whole.length(k), whole.value, tolerance(name))
    assert whole.counts == tuple(int((lengths == k).sum()) for k in range(whole.most + 1))
    close(terms.sum(0) + whole.bias, whole.value, whole.value, tolerance(name))


def test_mlps_may_be_hops_of_their_own() -> None:
    _, structure, inputs = built("bert", length=4)
    heads = [step.heads for step in steps(structure, count_mlp=True)]
    assert heads == [4, 1] * 3
    every = every_path(heads)
    terms = torch.cat([paths.terms(structure, inputs, some, count_mlp=True) for some in every.split(128)])
    whole = paths.decompose(structure, inputs, count_mlp=True)
    lengths = (every > 0).sum(1)
    assert whole.most == 6 and whole.counts[1] == 3 * 4 + 3
    for k in range(7):
        close(terms[lengths == k].sum(0), whole.length(k), whole.value)
    linear = paths.decompose(structure, inputs)
    assert float((linear.length(3) - whole.length(3)).abs().max()) > 1e-3
    close(linear.total(), whole.total(), whole.value)


def test_parallel_branches_are_one_step_when_mlps_count() -> None:
    _, structure, inputs = built("gpt_neox", length=4)
    heads = [step.heads for step in steps(structure, count_mlp=True)]
    assert heads == [5] * 3  # four heads, or the MLP
    every = every_path(heads)
    terms = torch.cat([paths.terms(structure, inputs, some, count_mlp=True) for some in every.split(128)])
    whole = paths.decompose(structure, inputs, count_mlp=True)
    for k in range(4):
        close(terms[(every > 0).sum(1) == k].sum(0), whole.length(k), whole.value)


@pytest.mark.parametrize("wrong", [[[0, 0]], [[0, 0, 5]], [[0, -1, 0]], [0, 0, 0]])
def test_what_is_no_path_is_refused(wrong: Any) -> None:
    structure, inputs = small()
    for use in (paths.terms, paths.live):
        with pytest.raises(RcProbeError, match="no paths") as error:
            use(structure, inputs, torch.tensor(wrong))
        assert "1 to 4" in str(error.value)


# ---- sources and lengths


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "llama", "opt"])
def test_sources_add_up(name: str) -> None:
    _, structure, inputs = built(name, length=6, padded=True)
    plain = paths.decompose(structure, inputs)
    split = paths.decompose(structure, inputs, by_source=True)
    limit = tolerance(name)
    assert set(split.sources) == {"tokens", "positions", "bias"}
    for k in range(split.most + 1):
        close(split.length(k), plain.length(k), plain.value, limit)
    close(split.bias, plain.bias, plain.value, limit)
    close(split.source("tokens") + split.source("positions"), plain.source("input"), plain.value, limit)
    close(split.total(), plain.total(), plain.value, limit)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "llama", "opt"])
@pytest.mark.parametrize("by_source", [False, True])
def test_sources_without_lengths_are_the_sums_over_all_lengths(name: str, by_source: bool) -> None:
    _, structure, inputs = built(name, length=6, padded=True)
    whole = paths.decompose(structure, inputs, by_source=by_source)
    summed_up = paths.decompose(structure, inputs, by_source=by_source, by_length=False)
    assert sorted(summed_up.sources) == sorted(set(whole.sources))
    assert summed_up.counts == whole.counts and set(summed_up.lengths) == {None}
    for source in set(whole.sources):
        close(summed_up.source(source), whole.source(source), whole.value, tolerance(name))
    with pytest.raises(RcProbeError, match="Leave by_length out"):
        summed_up.length(0)


def test_a_plain_pass_that_was_made_is_taken_for_the_check() -> None:
    """And it is looked at: what is not the model's own stream is refused."""
    model, structure, inputs = built("bert", length=6)
    calls: list[Any] = []
    head = ModelHead(structure, inputs, model)
    with structure.module(structure.blocks[0]).register_forward_pre_hook(lambda *_: calls.append(1)):
        found = paths.decompose(structure, inputs, plain=head.stream)
        assert len(calls) == 1
        alone = paths.decompose(structure, inputs)
        assert len(calls) == 3
    assert torch.equal(found.parts, alone.parts)
    with pytest.raises(RcProbeError, match="gives another output, by"):
        paths.decompose(structure, inputs, plain=head.stream * 1.01)
    assert torch.equal(paths.decompose(structure, inputs, plain=head.stream[:, 1:]).parts, alone.parts)


def test_tokens_are_what_the_embedding_of_words_gives() -> None:
    model, structure, inputs = built("gpt2", length=4)
    words = model.wte(inputs["input_ids"]).detach()
    first = paths.terms(structure, inputs, torch.zeros(1, 3, dtype=torch.long))[0]
    split = paths.decompose(structure, inputs, by_source=True)
    tokens, positions = (
        sum(split.parts[i] for i, (s, n) in enumerate(zip(split.sources, split.lengths, strict=True)) if (s, n) == (name, 0))
        for name in ("tokens", "positions")
    )  # fmt: skip
    close(tokens + positions, first, first)
    with torch.no_grad():
        model.wpe.weight.zero_()
    alone = paths.decompose(structure, inputs, by_source=True)
    assert float(alone.source("positions").abs().max()) < 1e-12 < float(alone.source("tokens").abs().max())
    assert words.shape == alone.length(0).shape


@pytest.mark.parametrize("longest", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("by_source", [False, True])
def test_what_is_longer_is_one_part(longest: int, by_source: bool) -> None:
    structure, inputs = small()
    whole = paths.decompose(structure, inputs)
    cut = paths.decompose(structure, inputs, max_length=longest, by_source=by_source)
    assert cut.most == min(longest + 1, 3) and cut.longest == min(longest, 3)
    for k in range(cut.longest + 1):
        close(cut.length(k), whole.length(k), whole.value)
    if longest < 3:
        rest = sum(whole.length(k) for k in range(longest + 1, 4))
        close(cut.length(longest + 1), rest, whole.value)
    assert sum(cut.counts) == 5**3 and len(cut.counts) == cut.most + 1
    close(cut.total(), whole.total(), whole.value)


def test_lengths_and_sources_that_are_not_there() -> None:
    structure, inputs = small()
    whole = paths.decompose(structure, inputs)
    for k in (-1, 4):
        with pytest.raises(RcProbeError, match="Lengths are 0 to 3"):
            whole.length(k)
    with pytest.raises(RcProbeError, match=r"'tokens'.*input.*by_source"):
        whole.source("tokens")
    with pytest.raises(RcProbeError, match="-1 is no length"):
        paths.decompose(structure, inputs, max_length=-1)


# ---- samples


def test_samples_estimate_every_length() -> None:
    """The mean of many repeats is within four standard errors of the exact part."""
    structure, inputs = small()
    whole = paths.decompose(structure, inputs)
    drawn = paths.sample(structure, inputs, paths=4, repeats=400, seed=0)
    assert drawn.parts.shape == (400, 4, *whole.value.shape)
    assert drawn.paths == (4, 12, 12, 4)
    close(drawn.parts[:, 0], whole.length(0).expand(400, -1, -1, -1), whole.value)  # a single path
    for k in range(1, 4):
        for parts, wanted in (
            (drawn.parts[:, k], whole.length(k)),
            (drawn.stream[:, k], whole.stream[whole.channels(k)].sum(0)),
        ):
            error = parts.std(0) / math.sqrt(400)
            score = (parts.mean(0) - wanted) / error
            assert float(score.abs().max()) < 4
            assert 0 < float(error.norm()) < 0.5 * float(wanted.norm())


@pytest.mark.parametrize("name", ["xlnet", "bloom", "falcon_new", "gpt_neox"])
def test_samples_of_other_families(name: str) -> None:
    _, structure, inputs = built(name, length=4)
    whole = paths.decompose(structure, inputs)
    drawn = paths.sample(structure, inputs, paths=5, repeats=80, seed=1)
    for k in range(1, whole.most + 1):
        score = (drawn.parts[:, k].mean(0) - whole.length(k)) / (drawn.parts[:, k].std(0) / math.sqrt(80))
        assert 0 < float(score.abs().max()) < 4


def test_a_sample_is_the_mean_over_its_own_paths() -> None:
    """All C(L, k) subsets of blocks, and the heads that were drawn, each path for H^k of its kind."""
    structure, inputs = small()
    drawn = sampling.draw_heads(steps(structure), 3, seed=7)
    found = paths.sample(structure, inputs, paths=3, repeats=1, seed=7).parts[0]
    for k in range(4):
        subsets = [s for s in itertools.product((0, 1), repeat=3) if sum(s) == k]
        rows = [
            [int(h + 1) * s for h, s in zip(heads, subset, strict=True)]
            for heads in drawn.T
            for subset in subsets
        ]
        terms = paths.terms(structure, inputs, torch.tensor(rows))
        close(found[k], terms.sum(0) * 4**k / 3, terms.sum(0) * 4**k)


@pytest.mark.parametrize(("count", "least"), [(5, 0.93), (20, 0.93), (1, 0.84)])
def test_intervals_cover(count: int, least: float) -> None:
    """Of 2,000 runs, each with its own seed and five repeats of `count` draws, 93 to 97 % hold the exact number.

    Of repeats of a single draw, which are few numbers and no bell, down to 84 %. The 64 choices of heads in three
    blocks are run once; a run's estimates are the means over what it draws.
    """
    structure, inputs = small()
    whole = paths.decompose(structure, inputs)
    exact = [_projected(whole.length(k), whole.value) for k in range(4)]
    drawn = sampling.draw_heads(steps(structure), 600, seed=3)
    found = paths.sample(structure, inputs, paths=1, repeats=600, seed=3).parts
    parts = torch.stack([_projected(found[:, k], whole.value) for k in range(4)], 1)  # (draws, lengths)
    by_choice = torch.full((64, 4), math.nan, dtype=torch.float64)
    by_choice[_choice(drawn)] = parts
    assert by_choice.isfinite().all()
    held = torch.zeros(4)
    for seed in range(2000):
        heads = _choice(sampling.draw_heads(steps(structure), 5 * count, seed))
        repeats = by_choice[heads].reshape(5, count, 4).mean(1)
        for k in range(1, 4):
            row = over_repeats(repeats[:, k], "projection")
            held[k] += row["low"] <= float(exact[k]) <= row["high"]
    assert all(least < float(share) < 0.97 for share in held[1:] / 2000), held / 2000


def _projected(part: Tensor, value: Tensor) -> Tensor:
    return ((part * value).sum((-3, -2, -1)) / value.square().sum()).double()


def _choice(heads: Tensor) -> Tensor:
    """The number of a choice of one of four heads in each of three blocks; heads (3, draws)."""
    return (heads * torch.tensor([[16], [4], [1]])).sum(0)


@pytest.mark.parametrize("at_once", [1, 3])
def test_chunks_do_not_change_the_numbers(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    structure, inputs = small()
    one = paths.sample(structure, inputs, paths=4, repeats=2, seed=5)
    sizes = []

    def little(*args: Any) -> int:
        sizes.append(args)
        return at_once

    monkeypatch.setattr(sampling, "_at_once", little)
    other = paths.sample(structure, inputs, paths=4, repeats=2, seed=5)
    assert sizes
    close(other.parts, one.parts, one.parts)
    close(other.stream, one.stream, one.stream)


def test_the_seed_decides_what_is_drawn() -> None:
    structure, inputs = small()
    before = torch.get_rng_state()
    one, same, other = (paths.sample(structure, inputs, paths=2, repeats=2, seed=s).parts for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_may_stop_at_a_length() -> None:
    structure, inputs = small()
    drawn = paths.sample(structure, inputs, paths=2, repeats=2)
    cut = paths.sample(structure, inputs, paths=2, repeats=2, max_length=1)
    close(cut.parts[:, :2], drawn.parts[:, :2], drawn.parts)
    close(cut.parts[:, 2], drawn.parts[:, 2:].sum(1), drawn.parts)


@pytest.mark.parametrize("folded", [False, True])
def test_a_choice_of_heads_goes_with_the_pattern(folded: bool) -> None:
    """To the values, through whatever moves a pattern about; each draw has the heads that it chose."""
    pattern = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    parts = torch.randn(4, 2, 3, 5, 6).double()  # two draws, two lengths
    chosen = torch.tensor([[True, False, False], [False, True, True]])
    op = AttentionOp(0, "softmax", 3)
    wanted = pattern @ parts * chosen.repeat(2, 1)[:, None, :, None, None]
    values = Parts(parts.sum(0), parts, Ledger(fixed=0, group=2))
    if folded:
        held = kept_heads(op, chosen)(pattern.flatten(0, 1))
        out = torch.bmm(torch.dropout(held, 0.1, False).to(torch.float64), values.flatten(0, 1)).unflatten(
            0, (2, 3)
        )
        torch.testing.assert_close(out.parts, wanted)
        return
    held = kept_heads(op, chosen)(pattern)
    for out in (
        held @ values,
        (held * 2.0).view(6, 5, 5).bmm(values.reshape(6, 5, 6)).view(2, 3, 5, 6) / 2,
        torch.einsum("bhij,bjhd->bhid", held, values.transpose(1, 2)),
        torch.einsum("ijbh,bhjd->bhid", held.permute(2, 3, 0, 1), values),
        torch.stack([held[:, h] @ values[:, h] for h in range(3)], 1),
    ):
        torch.testing.assert_close(out.value, pattern @ values.value)
        torch.testing.assert_close(out.parts, wanted)


def test_heads_that_are_mixed_before_the_values_are_refused() -> None:
    pattern, values = torch.rand(2, 3, 5, 5), torch.randn(4, 2, 3, 5, 6)
    held = kept_heads(AttentionOp(0, "softmax", 3), torch.eye(3, dtype=torch.bool))(pattern)
    stream = Parts(values.sum(0), values, Ledger(fixed=4))
    mixed = torch.einsum("bhij,hg->bgij", held, torch.rand(3, 3))
    assert isinstance(mixed, Unknown) and mixed.op == "einsum"
    assert isinstance(mixed @ stream, Unknown)
    with pytest.raises(RcProbeError, match="adds up heads"):
        torch.einsum("bhij,bhjd->bid", held, stream)


# ---- live paths


def test_live_paths_are_those_of_the_papers_code(sorting_san: Trained) -> None:
    model, ids = sorting_san.model, sorting_san.inputs[:8]
    structure = find_structure(model, {"input_ids": ids})
    rng = np.random.default_rng(0)
    L, H = 6, 2
    drawn = np.concatenate([reference_san.draw_paths(L, H, k, 3, rng) for k in range(L + 1)])
    ours = torch.from_numpy(np.where(drawn == H, 0, drawn + 1))
    found = paths.live(structure, {"input_ids": ids}, ours)
    with torch.no_grad():
        wanted = torch.stack([reference_san.walk(model, ids, path) for path in drawn])
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
        logits = reference_san.together(model, ids, drawn[3:6])
        torch.testing.assert_close(model.classifier(summed(found[3:6])), logits, atol=2e-5, rtol=1e-4)


def test_live_paths_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    structure, inputs = small()
    choose = torch.tensor([[0, 0, 0], [1, 0, 2], [4, 4, 4], [0, 3, 0]])
    one = paths.live(structure, inputs, choose)
    monkeypatch.setattr(living, "_at_once", lambda *args: 1)
    close(paths.live(structure, inputs, choose), one, one)
    single = torch.cat([paths.live(structure, inputs, row[None]) for row in choose])
    close(single, one, one)


# ---- what the paper found, on a model that sorts


def test_a_model_that_sorts_does_it_by_short_paths(sorting_san: Trained) -> None:
    model, inputs, labels = sorting_san.model, {"input_ids": sorting_san.inputs}, sorting_san.labels
    structure = find_structure(model, inputs)
    generator = torch.Generator().manual_seed(0)
    draws = [[living.draw_paths(steps(structure), k, 20, generator) for _ in range(5)] for k in range(7)]
    assert all(bool(((drawn > 0).sum(1) == k).all()) for k, repeats in enumerate(draws) for drawn in repeats)
    ends = [[summed(paths.live(structure, inputs, drawn)) for drawn in repeats] for repeats in draws]
    whole = paths.decompose(structure, inputs)
    assert whole.error < 1e-5
    parts = [whole.stream[whole.channels(k)].sum(0) for k in range(7)]
    bias = whole.stream_value - sum(parts)
    with ModelHead(structure, inputs, model) as head:

        def score(stream: Tensor) -> float:
            return accuracy(head(stream).logits, labels)

        entire = accuracy(head.plain.logits, labels)
        live = [float(np.mean([score(end) for end in repeats])) for repeats in ends]
        up_to = [score(bias + sum(parts[: k + 1])) for k in range(7)]
    assert entire > 0.95
    assert live[1] > 0.55
    assert np.mean(live[3:]) < 0.2
    assert abs(up_to[2] - entire) < 0.01
    assert up_to[6] == entire and up_to[0] < 0.6


# ---- effectiveness


@pytest.fixture(scope="module")
def causal_effects(trained_causal: Loaded) -> tuple[Effects, Loaded]:
    texts, _ = trained.walks(6, seed=5)
    samples = load_samples(texts, modality="text", samples=100)
    task, _ = choose_task(trained_causal, samples)
    assert task is not None
    made = list(batches(task.samples, trained_causal, batch_size=4))
    structure = find_structure(trained_causal.model, made[0].inputs)
    done: list[str] = []
    effects = effectiveness(structure, task, made, Budget(paths=(3,), repeats=4), done.append)
    assert not effects.notes
    assert done == ["exact", "sampled", "live"] * 2
    return effects, trained_causal


def test_a_batch_of_paths_takes_one_plain_pass(trained_causal: Loaded) -> None:
    """It serves the check of the decomposition, the sources, and the head."""
    texts, _ = trained.walks(4, seed=5)
    samples = load_samples(texts, modality="text", samples=100)
    task, _ = choose_task(trained_causal, samples)
    assert task is not None
    made = list(batches(task.samples, trained_causal, batch_size=2))
    structure = find_structure(trained_causal.model, made[0].inputs)
    calls: list[Any] = []
    with structure.module(structure.blocks[0]).register_forward_pre_hook(lambda *_: calls.append(1)):
        effects = effectiveness(structure, task, made, Budget(paths=()))
    scored = sum(row["metric"] == "loss" and row["estimator"] == "exact" for row in effects.rows)
    assert len(made) == 2 and scored == 10  # three scopes of three lengths, and biases alone
    # plain, by length, by source; for the head no block is called, but once in the trial of it
    assert len(calls) == 2 * (1 + 1 + 1) + 2


def test_sources_are_those_of_the_first_eight_samples_whatever_the_batches(trained_causal: Loaded) -> None:
    texts, _ = trained.walks(11, seed=5)
    task, _ = choose_task(trained_causal, load_samples(texts, modality="text", samples=100))
    assert task is not None
    found = []
    for size in (3, 8, 11):
        made = list(batches(task.samples, trained_causal, batch_size=size))
        structure = find_structure(trained_causal.model, made[0].inputs)
        found.append(effectiveness(structure, task, made, Budget(paths=())).sources)
    for other in found[1:]:
        for row, wanted in zip(other, found[0], strict=True):
            assert (row["source"], row["metric"]) == (wanted["source"], wanted["metric"])
            assert [row[k] for k in ("mean", "std", "low", "high")] == pytest.approx(
                [wanted[k] for k in ("mean", "std", "low", "high")], rel=2e-5, nan_ok=True
            )
    made = list(batches(task.samples, trained_causal, batch_size=8))
    whole = paths.decompose(structure, made[0].inputs, by_source=True)
    mask = whole.mask if whole.mask is not None else torch.ones(whole.value.shape[:2], dtype=torch.bool)
    sizes = {
        name: (whole.source(name) * mask[..., None]).double().square().sum((1, 2)).sqrt()
        for name in whole.sources
    }
    total = sum(sizes.values())
    for name, size in sizes.items():
        mean = next(r["mean"] for r in found[0] if (r["source"], r["metric"]) == (name, "norm_share"))
        assert mean == pytest.approx(float((size / total).mean()), rel=2e-5)


def test_effects_of_half_precision_are_those_of_the_same_weights_in_float32(trained_causal: Loaded) -> None:
    texts, _ = trained.walks(4, seed=5)
    half = copy.deepcopy(trained_causal.model).bfloat16()
    frames = []
    for model in (half, copy.deepcopy(half).float()):
        loaded = replace(trained_causal, model=model)
        task, _ = choose_task(loaded, load_samples(texts, modality="text", samples=100))
        assert task is not None
        made = list(batches(task.samples, loaded, batch_size=2))
        effects = effectiveness(
            find_structure(model, made[0].inputs), task, made, Budget(paths=(2,), repeats=2)
        )
        assert not effects.notes
        frames.append((pd.DataFrame(effects.rows), pd.DataFrame(effects.sources)))
    for found, wanted in zip(*frames, strict=True):
        assert found.equals(wanted)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


class OneAfterTheOther(World):
    """Two processes in one, the second before the first."""

    def together(self, work: Callable[[], Any], what: str = "") -> list[Any]:
        found = []
        for self.rank, self.size in ((1, 2), (0, 2)):
            found.append(work())
        return found


def test_intervals_are_those_of_samples_in_the_order_of_the_data(trained_causal: Loaded) -> None:
    """Bootstraps depend on it: `agreement` of texts has eleven shares here."""
    texts, _ = trained.walks(11, seed=5)
    task, _ = choose_task(trained_causal, load_samples(texts, modality="text", samples=100))
    assert task is not None
    made = list(batches(task.samples, trained_causal, batch_size=2))
    structure = find_structure(trained_causal.model, made[0].inputs)
    one, two = (
        effectiveness(structure, task, made, Budget(paths=()), world=world)
        for world in (World(), OneAfterTheOther())
    )
    assert pd.DataFrame(two.rows).equals(pd.DataFrame(one.rows))
    assert two.sources == one.sources and two.error == one.error


def number(effects: Effects, **wanted: Any) -> dict[str, Any]:
    rows = [row for row in effects.rows if all(row[key] == value for key, value in wanted.items())]
    assert len(rows) == 1, (wanted, rows)
    return rows[0]


def test_the_rows_of_effectiveness(causal_effects: tuple[Effects, Loaded]) -> None:
    effects, _ = causal_effects
    assert effects.error < 1e-5 and not effects.notes
    keys = [
        tuple(row[k] for k in ("length", "estimator", "drawn", "scope", "metric")) for row in effects.rows
    ]
    assert len(keys) == len(set(keys))
    assert {row["estimator"] for row in effects.rows} == {"exact", "sampled", "live", "full", "baseline"}
    lengths = {row["length"] for row in effects.rows}
    assert lengths == {None, 0, 1, 2}
    assert {row["count"] for row in effects.rows if row["length"] == 1} == {"4"}  # two blocks of two heads
    for row in effects.rows:
        assert math.isfinite(row["mean"])
        if row["low"] == row["low"]:
            assert row["low"] <= row["mean"] <= row["high"]
    for scope in ("alone", "up_to", "all_but"):
        for metric in ("agreement", "accuracy", "loss"):
            for k in range(3):
                number(effects, estimator="exact", scope=scope, metric=metric, length=k)


def test_all_lengths_together_are_the_model(causal_effects: tuple[Effects, Loaded]) -> None:
    effects, _ = causal_effects
    everything = {"estimator": "exact", "scope": "up_to", "length": 2}
    assert number(effects, **everything, metric="agreement")["mean"] == 1.0
    for metric in ("accuracy", "loss"):
        full = number(effects, estimator="full", metric=metric)
        assert number(effects, **everything, metric=metric)["mean"] == pytest.approx(full["mean"], abs=1e-5)
    projections = [
        number(effects, estimator="exact", scope="alone", metric="projection", length=k)["mean"]
        for k in range(3)
    ]
    shares = [
        number(effects, estimator="exact", scope="alone", metric="norm_share", length=k)["mean"]
        for k in range(3)
    ]
    bias = next(r["mean"] for r in effects.sources if (r["source"], r["metric"]) == ("bias", "projection"))
    assert 0 < sum(shares) < 1
    assert abs(sum(projections) + bias - 1) < 0.05  # the sources are those of the first batch alone


def test_leaving_the_longest_out_is_going_up_to_the_one_before(
    causal_effects: tuple[Effects, Loaded],
) -> None:
    effects, _ = causal_effects
    for metric in ("agreement", "accuracy", "loss"):
        without = number(effects, estimator="exact", scope="all_but", length=2, metric=metric)
        up_to = number(effects, estimator="exact", scope="up_to", length=1, metric=metric)
        assert without["mean"] == pytest.approx(up_to["mean"], abs=1e-4)
        none = number(effects, estimator="exact", scope="alone", length=0, metric=metric)
        assert (
            none["mean"] == number(effects, estimator="exact", scope="up_to", length=0, metric=metric)["mean"]
        )


def test_samples_of_the_one_path_of_length_0_are_exact(causal_effects: tuple[Effects, Loaded]) -> None:
    effects, _ = causal_effects
    for metric in ("agreement", "accuracy", "loss", "projection"):
        exact = number(effects, estimator="exact", scope="alone", length=0, metric=metric)
        drawn = number(effects, estimator="sampled", scope="alone", length=0, metric=metric)
        assert drawn["mean"] == pytest.approx(exact["mean"], abs=1e-5)
        assert drawn["drawn"] == 3 and drawn["std"] == pytest.approx(0, abs=1e-6)


def test_autocast_around_it_changes_nothing() -> None:
    model, inputs = zoo.build("bert")[:2]
    plain = paths.decompose(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = paths.decompose(model, inputs)
    assert torch.equal(plain.parts, under.parts)


@pytest.mark.parametrize(("name", "tokens"), [("vit", 17), ("swin", 64), ("bert", 6), ("xlnet", 6)])
def test_what_goes_at_once_is_told_by_the_stream_not_by_the_inputs(name: str, tokens: int) -> None:
    """Images have three channels and many tokens: by their channels they would take far more than a gigabyte."""
    _, structure, inputs = built(name, length=6)
    dim = structure.blocks[0].dim
    assert sampling._at_once(structure, inputs, 3) == 2**30 // (2 * tokens * dim * 4 * 8 * 3 * 4)
    assert living._at_once(structure, inputs) == 2**30 // (2 * tokens * dim * 64)


@pytest.mark.parametrize("decoder_mask", [False, True])
def test_each_stack_has_the_mask_of_its_own_text(decoder_mask: bool) -> None:
    config = transformers.T5Config(vocab_size=40, d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=64)
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.randint(4, 40, (2, 8), generator=torch.Generator().manual_seed(0))
    read, written = (torch.arange(8) < torch.tensor([[8], [n]]) for n in (5, 6))
    inputs = {"input_ids": ids, "attention_mask": read.long(), "decoder_input_ids": ids}
    if decoder_mask:
        inputs["decoder_attention_mask"] = written.long()
    for stack, wanted in (("encoder", read), ("decoder", written if decoder_mask else None)):
        mask = paths.decompose(model, inputs, stack=stack).mask
        assert mask is None if wanted is None else torch.equal(mask, wanted)
