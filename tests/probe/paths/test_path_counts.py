"""Path counts against enumeration, the closed form, and the figures of the paper."""

import io
import itertools
import json
import math
from collections import Counter

import pandas as pd
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support.attention import attached
from support.structures import with_branch, with_junction

from rc_probe import ProbeResult, RcProbeError
from rc_probe.hooks.attach import find_structure
from rc_probe.paths.path_counts import (
    ARCHITECTURES,
    architecture_rows,
    count_rows,
    hops,
    length_shares,
    mean_length,
    path_counts,
)
from rc_probe.results.files import to_csv

# Lengths of the paths of nine models, decoded from the paper's figure: mean, commonest length, its share, share of
# the longest, log10 of all. MobileBERT as plotted there, with 12 layers.
FIGURE = [
    ("GPT-3", 96, 96, 95.010, 95, 0.3698, 0.3698, 190.73),
    ("T5-11B", 24, 128, 23.814, 24, 0.8296, 0.8296, 50.65),
    ("T5-3B", 24, 32, 23.273, 24, 0.4778, 0.4778, 36.44),
    ("ViT-H", 32, 16, 30.118, 31, 0.2874, 0.1437, 39.37),
    ("BERT-large", 24, 16, 22.588, 23, 0.3501, 0.2334, 29.53),
    ("BERT-base", 12, 12, 11.077, 11, 0.3827, 0.3827, 13.37),
    ("DistilBERT", 6, 12, 5.538, 6, 0.6186, 0.6186, 6.68),
    ("MobileBERT", 12, 4, 9.600, 10, 0.2835, 0.0687, 8.39),
    ("DeiT-T", 12, 3, 9.000, 9, 0.2581, 0.0317, 7.22),
]


@given(st.lists(st.integers(0, 4), max_size=5))
def test_counts_are_those_of_enumeration(heads: list[int]) -> None:
    paths = itertools.product(*(range(H + 1) for H in heads))
    found = Counter(sum(choice > 0 for choice in path) for path in paths)
    assert path_counts(heads) == [found[k] for k in range(len(heads) + 1)]


@given(st.integers(0, 100), st.integers(1, 130))
def test_counts_of_equal_layers(layers: int, heads: int) -> None:
    counts = path_counts([heads] * layers)
    assert counts == [math.comb(layers, k) * heads**k for k in range(layers + 1)]
    assert sum(counts) == (heads + 1) ** layers
    assert mean_length([heads] * layers) == pytest.approx(layers * heads / (heads + 1))


@given(st.lists(st.integers(1, 200), max_size=60))
def test_shares_are_a_law_with_that_mean(heads: list[int]) -> None:
    shares = length_shares(heads)
    assert math.fsum(shares) == pytest.approx(1, abs=1e-12)
    assert sum(k * share for k, share in enumerate(shares)) == pytest.approx(mean_length(heads))


def test_the_length_is_binomial() -> None:
    assert length_shares([16] * 32) == pytest.approx(stats.binom.pmf(range(33), 32, 16 / 17), rel=1e-9)


@pytest.mark.parametrize(("name", "layers", "heads", "mean", "mode", "top", "full", "log"), FIGURE)
def test_the_figure_of_the_paper(
    name: str, layers: int, heads: int, mean: float, mode: int, top: float, full: float, log: float
) -> None:
    if name != "MobileBERT":
        assert ARCHITECTURES[name] == (layers, heads)
    shares = length_shares([heads] * layers)
    assert mean_length([heads] * layers) == pytest.approx(mean, abs=5e-4)
    assert shares[mode] == pytest.approx(max(shares), rel=1e-12)
    assert max(shares) == pytest.approx(top, abs=5e-5)
    assert shares[-1] == pytest.approx(full, abs=5e-5)
    assert math.log10(sum(path_counts([heads] * layers))) == pytest.approx(log, abs=0.005)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("BERT-base", transformers.BertConfig),
        ("DistilBERT", transformers.DistilBertConfig),
        ("MobileBERT", transformers.MobileBertConfig),
        ("ALBERT-xxlarge", transformers.AlbertConfig),
        ("GPT-2", transformers.GPT2Config),
        ("ViT-B", transformers.ViTConfig),
        ("Llama-2-7B", transformers.LlamaConfig),
    ],
)
def test_architectures_are_the_defaults_of_the_library(name: str, config: type) -> None:
    made = config()
    assert ARCHITECTURES[name] == (made.num_hidden_layers, made.num_attention_heads)


def test_counts_survive_being_saved(tmp_path: object) -> None:
    rows = [*count_rows("mine", [96] * 96), *architecture_rows()]
    result = ProbeResult({}, {}, {}, {"path_counts": pd.DataFrame(rows)})
    wanted = [math.comb(96, k) * 96**k for k in range(97)]
    saved = json.loads(result.to_json())["tables"]["path_counts"]
    read = pd.read_csv(io.StringIO(to_csv(result.tables["path_counts"])), dtype={"count": str})
    for found in (saved, read.to_dict("records")):
        mine = [row for row in found if row["model"] == "mine"]
        assert [int(row["count"]) for row in mine] == wanted
        assert [row["length"] for row in mine] == list(range(97))
        assert [row["share"] for row in mine] == length_shares([96] * 96)
        assert {row["model"] for row in found} == {"mine", *ARCHITECTURES}


# ---- of a model at hand


@pytest.mark.parametrize(
    ("name", "plain", "with_mlp"),
    [
        ("bert", [4, 4, 4], [4, 1] * 3),  # sequential
        ("gpt_neox", [4, 4, 4], [5, 5, 5]),  # MLP and attention in one junction
        ("albert", None, None),  # shared weights are blocks of their own
        ("llama", None, None),  # heads of the queries, not of the keys
    ],
)
def test_hops_of_a_model(name: str, plain: list[int] | None, with_mlp: list[int] | None) -> None:
    model, _, structure = attached(name)
    L, H = model.config.num_hidden_layers, model.config.num_attention_heads
    assert hops(structure) == (plain or [H] * L)
    assert hops(structure, count_mlp=True) == (with_mlp or [H, 1] * L)


def test_cross_attention_is_no_hop() -> None:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 3}
    model = transformers.T5Model(transformers.T5Config(**sizes, num_heads=4)).eval()
    structure = find_structure(model, stack="decoder.block")
    assert structure.signature == "A|X|M"
    assert hops(structure) == [4, 4, 4]
    assert hops(structure, count_mlp=True) == [4, 1] * 3


def test_heads_of_parallel_attention_add_up() -> None:
    _model, _, structure = attached("gpt_neox")
    branches = structure.blocks[1].junctions[0].branches
    again = next(b for b in branches if b.kind == "attention")
    assert hops(with_junction(structure, 1, 0, branches=(*branches, again))) == [4, 8, 4]


def test_unknown_heads_are_refused() -> None:
    _model, _, structure = attached("bert")
    with pytest.raises(RcProbeError, match=r"block 2 .*heads of its attention are not known"):
        hops(with_branch(structure, 1, 0, ops=()))
