"""The residual of pure attention below the float floor: the paper's cubic law, and exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from support import high_precision_san as mpsan
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertModel

from rc_probe.hooks.errors import RcProbeError
from rc_probe.hooks.split.rules import Split
from rc_probe.measures.below_floor.recursion import recursion, relative_residual
from rc_probe.models.load import Loaded

BIOGRAPHY = (
    "Ada Lovelace was an English mathematician and writer, chiefly known for her work on the proposed "
    "mechanical computer of Charles Babbage. She was the first to see that the machine had uses beyond "
    "pure calculation, and wrote what many hold to be the first algorithm meant for such a machine. Her "
    "mother had her taught science and logic from an early age, lest she should become a poet like her "
    "father, whom she never knew. She met Babbage at a party in the summer of her first season and was "
    "shown a part of his engine; the two wrote letters to each other for the rest of her life. She died "
    "of cancer at thirty-six and was buried, at her own wish, next to her father in a small church in "
    "Nottinghamshire."
)


def attention_only(layer: Any) -> Callable[[Any], Any]:
    """A BERT layer as pure attention: no skip, no MLP sublayer, the norm stays."""
    output = layer.attention.output
    return lambda x: output.LayerNorm(output.dense(layer.attention.self(x)[0]))


def bert(**config: Any) -> BertModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertModel(BertConfig(**config)).eval()


def plain_residuals(blocks: list[Callable[[Any], Any]], x: Tensor) -> list[float]:
    found = []
    with torch.no_grad():
        for block in [lambda x: x, *blocks]:
            x = block(x)
            r, whole = (x - x.mean(1, keepdim=True))[0].abs(), x[0].abs()
            found.append(
                float((r.sum(0).max() * r.sum(1).max() / whole.sum(0).max() / whole.sum(1).max()).sqrt())
            )
    return found


def test_bert_at_initialisation_follows_the_cubic_law(demo: Loaded) -> None:
    """The table of measured values for BERT-base, seed 0, 128 tokens of English."""
    ids = demo.processor(BIOGRAPHY, truncation=True, max_length=128, return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 128)
    model = bert()
    with torch.no_grad():
        x = model.embeddings(ids)
    blocks = [attention_only(layer) for layer in model.encoder.layer]
    found = recursion(blocks, x, direct=plain_residuals(blocks, x))
    residuals = [row["residual"] for row in found.rows]
    expected = [5.61e-1, 1.86e-2, 8.18e-7, 8.00e-20, 1.42e-58, 1.15e-174]
    assert len(residuals) == 6
    for exponent, (r, e) in enumerate(zip(residuals, expected, strict=True)):
        assert abs(torch.tensor(r / e, dtype=torch.float64).log10()) < 0.05 * 3**exponent / 3
    assert all(0.05 < row["ratio_cubed"] < 0.6 for row in found.rows[1:])
    assert all(row["residual_direct"] > 5e-8 for row in found.rows)  # the floor of float32
    assert found.note == "From layer 6 on the residual is below the range of float64"


def test_a_small_bert_agrees_with_exact_arithmetic() -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 4}
    model = bert(vocab_size=20, **sizes)
    x = model.embeddings(torch.tensor([[3, 7, 1, 12]])).detach()
    rows = recursion([attention_only(layer) for layer in model.encoder.layer], x).rows
    with mpmath.workdps(500):
        exact, expected = mpsan.exact(x[0]), []
        for layer in model.encoder.layer:
            own, output = layer.attention.self, layer.attention.output
            q, k, v = (mpsan.affine(exact, p.weight, p.bias) for p in (own.query, own.key, own.value))
            mixed = mpsan.affine(mpsan.attention(q, k, v, 2), output.dense.weight, output.dense.bias)
            norm = output.LayerNorm
            exact = mpsan.layer_norm(mixed, norm.weight, norm.bias, norm.eps)
            expected.append(mpsan.composite(mpsan.residual(exact)) / mpsan.composite(exact))
        assert expected[-1] < mpmath.mpf("1e-60")
        for row, true in zip(rows[1:], expected, strict=True):
            assert abs(row["residual"] / true - 1) < 1e-10


def halving(x: Any) -> Any:
    """A block that halves the residual and keeps the centre."""
    assert isinstance(x, Split)
    return Split(x.center, x.residual / 2, x.axis)


def test_rows_ratio_and_columns() -> None:
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    mean = x.mean(1, keepdim=True)
    direct = [relative_residual(Split.of(mean + (x - mean) / 2**layer)) for layer in range(3)]
    found = recursion([halving, halving], x, direct=direct)
    for layer, row in enumerate(found.rows):
        assert list(row) == ["layer", "residual", "residual_direct", "ratio_cubed"]
        assert row["layer"] == layer
        assert row["residual_direct"] == direct[layer]
        assert row["residual"] == pytest.approx(direct[layer], rel=1e-6)
    assert found.rows[0]["ratio_cubed"] is None
    assert found.rows[2]["ratio_cubed"] == pytest.approx(direct[2] / direct[1] ** 3, rel=1e-5)
    assert found.note == ""
    assert recursion([halving], x).rows[1]["residual_direct"] is None


def test_padding_counts_for_nothing() -> None:
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([True] * 4 + [False] * 2)
    padded = x.clone()
    padded[:, 4:] = 1000
    assert relative_residual(Split.of(padded, mask=mask), mask) == pytest.approx(
        relative_residual(Split.of(x[:, :4])), rel=1e-12
    )


def test_the_stream_may_be_time_first() -> None:
    x = torch.randn(6, 1, 4, generator=torch.Generator().manual_seed(0))
    first = recursion([halving], x, axis=-3).rows
    assert first == recursion([halving], x.movedim(0, 1)).rows
    assert first[0]["residual"] > 0.1


def test_it_ends_where_float64_ends() -> None:
    def cube(x: Any) -> Any:
        return Split(x.center, x.residual.pow(3) / 1e3, x.axis)

    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    found = recursion([cube] * 9, x)
    assert 1e-290 < found.rows[-1]["residual"] < 1e-60
    assert found.note == f"From layer {len(found.rows)} on the residual is below the range of float64"


@pytest.mark.parametrize(("size", "known"), [(1e-150, True), (1e-200, False)])
def test_the_ratio_is_finite_or_left_out(size: float, known: bool) -> None:
    def shrink(s: Any) -> Any:
        return Split(s.center, s.residual * size, s.axis)

    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    *_, before, last = recursion([shrink, halving], x).rows
    if known:
        assert last["ratio_cubed"] * before["residual"] ** 2 == pytest.approx(0.5, rel=1e-9)
    else:
        assert last["ratio_cubed"] is None


def test_each_gets_the_stream_before_every_block() -> None:
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, float]] = []
    rows = recursion([halving] * 3, x, each=lambda layer, s: seen.append((layer, relative_residual(s)))).rows
    assert seen == [(row["layer"] + 1, row["residual"]) for row in rows[:3]]


def test_a_missing_rule_names_the_block() -> None:
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RcProbeError, match=r"block 2: `gelu` has no rule") as error:
        recursion([halving, functional.gelu], x)
    assert error.value.todo


def test_a_result_unlike_plain_arithmetic_is_refused() -> None:
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    r = [row["residual"] for row in recursion([halving], x).rows]
    assert recursion([halving], x, direct=[r[0], 1.01 * r[1]]).rows  # rounding of a plain run
    for wrong in (1.2 * r[1], 0.8 * r[1], float("nan")):
        with pytest.raises(RcProbeError, match="layer 1: split arithmetic gives a residual of"):
            recursion([halving], x, direct=[r[0], wrong])


def test_the_floor_of_plain_arithmetic_is_not_a_disagreement() -> None:
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))

    def collapse(s: Any) -> Any:
        return Split(s.center, s.residual * 1e-30, s.axis)

    rows = recursion([collapse], x, direct=[relative_residual(Split.of(x)), 2e-7]).rows
    assert rows[1]["residual"] < 1e-29
    with pytest.raises(RcProbeError, match="layer 1"):
        recursion([collapse], x, direct=[relative_residual(Split.of(x)), 2e-7], eps=1e-16)
