"""Heads of a lower rank, against forms truncated by dense SVDs of the weights, in every loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny, zoo
from support.head_weights import WIDTH, by_hand
from torch import Tensor

import rc_probe
from rc_probe import RcProbeError
from rc_probe.data.batches import Batch
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.attention_patterns import patterns
from rc_probe.interventions.grammar import parse_intervention

FAMILIES = ["bert", "gpt2", "llama", "gpt_neox", "vit"]
MODELS: dict[str, tuple[Any, dict[str, Tensor]]] = {}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any, dict[str, Tensor]]]:
    name = request.param
    if name not in MODELS:
        MODELS[name] = zoo.build(name, padded=True)
    yield name, *MODELS[name]


def run(model: Any, inputs: dict[str, Tensor], spec: str | None, **more: Any) -> Tensor:
    if spec is None:
        with torch.no_grad():
            return model(**inputs)[0]
    with torch.no_grad(), rc_probe.ablate(model, spec, inputs=inputs, **more):
        return model(**inputs)[0]


def low(
    maps: dict[str, Tensor], head: int, rank: int, gram: Tensor | None = None, keep: slice | None = None
) -> Tensor:
    """P with Mr = AᵀPB, from a dense SVD: of M, or of LᵀML whitened by the second moments of what enters, gram = LLᵀ."""
    a, b = maps["query"][head], maps["key"][head]
    root = torch.eye(a.shape[1], dtype=torch.float64) if gram is None else torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(root.T @ a.T @ b @ root)
    chosen = keep or slice(rank)
    wanted = (
        torch.linalg.inv(root.T) @ u[:, chosen] @ torch.diag(s[chosen]) @ v[chosen] @ torch.linalg.inv(root)
    )
    return torch.linalg.pinv(a.T) @ wanted @ torch.linalg.pinv(b)


def scores_of(model: Any, inputs: dict[str, Tensor], block: int, spec: str | None, **more: Any) -> Tensor:
    """log of the attention pattern of a block: its scores, up to a number for each row; masked entries are -inf."""
    found: list[Tensor] = []
    structure = find_structure(model, inputs)
    keep = lambda b, branch, p: found.append(p.double().log()) if b.index == block else None  # noqa: E731
    with patterns(structure, keep):
        run(model, inputs, spec, **more)
    return found[-1]


def test_the_scores_are_those_of_the_truncated_form(family: tuple[str, Any, dict[str, Tensor]]) -> None:
    """Block 1 of each family: q' = Pᵀq with P from a dense SVD, put in by editing the weights of a copy."""
    import copy

    name, model, inputs = family
    for method, keep in (("weights", slice(3)), ("bottom", slice(WIDTH - 3, WIDTH))):
        changed = copy.deepcopy(model)
        maps = by_hand(name, model, 0)
        for head in range(4):
            _edit(name, changed, head, low(maps, head, 3, keep=keep))
        wanted = run(changed, inputs, None)
        found = run(model, inputs, f"rank@1=3:{method}")
        assert torch.allclose(found, wanted, atol=2e-5), method
        assert not torch.allclose(found, run(model, inputs, None), atol=1e-3)


def _edit(name: str, model: Any, head: int, p: Tensor) -> None:
    """Queries q = Wz + b of a head become Pᵀq."""
    rows = slice(head * WIDTH, (head + 1) * WIDTH)
    with torch.no_grad():
        if name == "gpt2":
            attn = model.h[0].attn.c_attn
            attn.weight[:, rows] = (attn.weight[:, rows].double() @ p).float()
            attn.bias[rows] = (attn.bias[rows].double() @ p).float()
            return
        if name == "gpt_neox":
            linear, rows = (
                model.layers[0].attention.query_key_value,
                slice(head * 3 * WIDTH, head * 3 * WIDTH + WIDTH),
            )
        elif name == "bert":
            linear = model.encoder.layer[0].attention.self.query
        else:
            linear = (model.layers[0].attention if name == "vit" else model.layers[0].self_attn).q_proj
        linear.weight[rows] = (p.T @ linear.weight[rows].double()).float()
        if linear.bias is not None:
            linear.bias[rows] = (p.T @ linear.bias[rows].double()).float()


def test_full_rank_is_the_plain_model_bit_by_bit(family: tuple[str, Any, dict[str, Tensor]]) -> None:
    _, model, inputs = family
    plain = run(model, inputs, None)
    assert torch.equal(run(model, inputs, f"rank@all={WIDTH}"), plain)
    assert torch.equal(run(model, inputs, f"rank@2:1,3={WIDTH}:random"), plain)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_moments_of_the_data_choose_what_is_kept(name: str) -> None:
    """Whitened by E[z zᵀ] of the real tokens that enter the block, from a hook on its projection; padding is none of them."""
    import copy

    model, inputs = zoo.build(name, padded=True)
    seen: list[Tensor] = []
    projection = (
        model.encoder.layer[0].attention.self.query if name == "bert" else model.layers[0].self_attn.q_proj
    )
    handle = projection.register_forward_pre_hook(lambda m, args: seen.append(args[0].double()))
    other = zoo.inputs_for(name, model, batch=12, length=10, padded=True, seed=5)
    with torch.no_grad():
        model(**other)
    handle.remove()
    z = seen[0][other["attention_mask"].bool()]
    if name == "llama":  # `by_hand` has the gain of the norm in the weights: z without it
        z = z / model.layers[0].input_layernorm.weight.detach().double()
    z = torch.cat([z, torch.ones(len(z), 1, dtype=torch.float64)], 1)
    changed = copy.deepcopy(model)
    for head in range(4):
        _edit(name, changed, head, low(by_hand(name, model, 0), head, 2, gram=z.T @ z))
    parts = [{key: value[rows] for key, value in other.items()} for rows in (slice(0, 5), slice(5, 12))]
    found = run(model, inputs, "rank@1=2:data", readings=parts)
    assert torch.allclose(found, run(changed, inputs, None), atol=5e-5)
    assert not torch.allclose(found, run(model, inputs, "rank@1=2"), atol=1e-3)


def test_the_rank_holds_at_every_offset() -> None:
    """Rotary positions: queries of every token lie in a space of 2 dimensions before they turn, and keys are untouched."""
    model, inputs = zoo.build("llama")
    structure = find_structure(model, inputs)
    from rc_probe.hooks.edits.edits import Editing
    from rc_probe.hooks.heads.operands import watch_operands
    from rc_probe.hooks.heads.read import heads_of

    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for spec in ("rank@1=8", "rank@1:2=2"):
        edits = parse_intervention(spec).edits(structure)
        keep = lambda block, q, k, spec=spec: seen.__setitem__(spec, (q.double(), k.double()))  # noqa: E731
        with torch.no_grad(), Editing(structure, watch_operands(heads_of(structure, (1,)), keep).then(edits)):
            model(**inputs)
    plain, low_rank = seen["rank@1=8"], seen["rank@1:2=2"]
    assert torch.equal(plain[1], low_rank[1])
    assert torch.equal(plain[0][:, [0, 2, 3]], low_rank[0][:, [0, 2, 3]])
    heads = heads_of(structure, (1,))[0]
    assert heads.rotary is not None
    turned = low_rank[0][:, 1]  # (batch, tokens, width)
    back = turned.clone()
    at = torch.arange(turned.shape[1], dtype=torch.float64)[:, None] * heads.rotary.angles
    first, second = heads.rotary.pairs.T
    back[..., first] = turned[..., first] * at.cos() + turned[..., second] * at.sin()
    back[..., second] = turned[..., second] * at.cos() - turned[..., first] * at.sin()
    values = torch.linalg.svdvals(back.flatten(0, 1))
    assert values[1] > 0.05 * values[0] and values[2] < 1e-3 * values[0]


def test_rank_zero_looks_at_all_alike_and_caches_go_on() -> None:
    model, inputs = zoo.build("gpt2_lm")
    logs = scores_of(model, inputs, 1, "rank@2=0")
    rows = torch.arange(1, 13, dtype=torch.float64).log()
    assert torch.allclose(
        torch.where(logs.isfinite(), logs, -rows[:, None]), -rows[:, None].expand_as(logs), atol=1e-5
    )
    prompt = inputs["input_ids"][:1]
    with rc_probe.ablate(model, "rank@all=3"):
        cached = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
        bare = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, bare)


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("rank@2:9=4", "there is no head 9. Heads are numbered 1 to 4"),
        ("rank@1=9", "its heads are 8 wide, and none has rank 9"),
        ("rank@1=-1", "'-1' is no rank"),
        ("rank@1", "'' is no rank"),
        ("rank@1=4:best", "'best' is no way to choose what is kept"),
        ("rank@1=4:data", "goes by the queries and keys of the plain model, and no data is given"),
    ],
)
def test_bad_specs_are_one_line(spec: str, what: str) -> None:
    model, inputs = MODELS.setdefault("bert", zoo.build("bert", padded=True))
    with pytest.raises(RcProbeError) as error:
        run(model, inputs, spec)
    assert what in str(error.value) and "\n" not in str(error.value)


def test_a_model_that_cannot_be_truncated_is_refused_before_it_runs() -> None:
    model, inputs = zoo.build("qwen3")
    with pytest.raises(RcProbeError, match=r"block 1 .*its heads cannot be read: .*q_norm"):
        rc_probe.ablate(model, "rank@all=2", inputs=inputs)


def test_a_run_measures_them_and_batches_change_nothing() -> None:
    model, _ = zoo.build("llama")
    texts = [tiny.words(n, step) for n, step in ((9, 1), (14, 3), (5, 5), (8, 7))]
    found = []
    for batch in (1, 4):
        result = rc_probe.probe(
            model, texts, processor=tiny.tokenizer(special=False), ablate=["rank@all=2:data", "rank@2=8"], batch_size=batch,
            init=False, recursion=False, paths=False, metrics=("residual",), importance="none",
        )  # fmt: skip
        rows = result.residuals.query("layer == 3").set_index("variant")["mean"]
        found.append(rows["rank@all=2:data"])
        assert rows["rank@2=8"] == rows["transformer"] != rows["rank@all=2:data"]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_processes_put_their_moments_together() -> None:
    from rc_probe import engine

    model, inputs = zoo.build("bert")
    structure = find_structure(model, inputs)
    asked = parse_intervention("rank@1=2:data").interventions
    halves = [
        Batch({key: value[rows] for key, value in inputs.items()}, None)
        for rows in (slice(0, 1), slice(1, 2))
    ]
    other: list[Any] = []
    engine.prepare(structure, halves[:1], asked, lambda sums: other.append(sums) or [sums])
    alone = run(model, inputs, "rank@1=2:data", readings=[halves[0].inputs])
    engine.prepare(structure, halves[1:], asked, lambda sums: [*other, sums])
    with torch.no_grad(), rc_probe.ablate(model, "rank@1=2:data", inputs=inputs, readings=[]):
        together = model(**inputs)[0]
    whole = run(model, inputs, "rank@1=2:data", readings=[inputs])
    assert torch.allclose(together, whole, atol=1e-5) and not torch.allclose(alone, whole, atol=1e-4)


def test_the_harness_reads_its_own_texts_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain model reads the texts of the task; scores are those of the same intervention by hand."""
    from rc_probe.integrations import lm_eval as harness

    model, _ = zoo.build("gpt2_lm")
    texts = [tiny.words(n, 1) for n in (6, 9)]
    monkeypatch.setattr(harness, "task_texts", lambda place: iter(texts))
    given = harness._texts_of(["mine"], None, model, tiny.tokenizer(special=False))
    assert [each["input_ids"].shape[1] for each in given] == [6, 9]
    structure = find_structure(model, zoo.inputs_for("gpt2_lm", model))
    from rc_probe import engine

    asked = parse_intervention("rank@1=2:data").interventions
    engine.prepare(structure, [Batch(each, None, n) for n, each in enumerate(given)], asked)
    wanted = run(model, given[1], "rank@1=2:data", readings=given)
    assert not torch.allclose(wanted, run(model, given[1], None), atol=1e-3)
