"""A model of which blocks were cut out, beside the whole one; and an encoder-decoder's encoder below the float floor."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.by_hand import gpt2, made, residuals
from support.tiny import tokenizer, words

import rc_probe
from rc_probe import RcProbeError

TEXTS = [words(6), words(9, 3)]
QUIET = {"init": False, "paths": False, "recursion": False, "metrics": "residual"}


def measured(model: Any) -> rc_probe.ProbeResult:
    return rc_probe.probe(model, TEXTS, processor=tokenizer(special=False), **QUIET)


def curve(result: rc_probe.ProbeResult) -> list[float]:
    table = result.tables["residuals"]
    return table[table["variant"] == "transformer"]["mean"].tolist()


@pytest.fixture(scope="module")
def whole() -> tuple[Any, rc_probe.ProbeResult]:
    model = gpt2(vocab_size=32, n_layer=5)
    return model, measured(model)


def cut(model: Any, *blocks: int) -> Any:
    """Without these blocks, numbered from 1."""
    model = copy.deepcopy(model)
    model.transformer.h = torch.nn.ModuleList(
        b for n, b in enumerate(model.transformer.h, 1) if n not in blocks
    )
    model.config.n_layer = len(model.transformer.h)
    return model


def test_a_pruned_model_against_the_whole(whole: tuple[Any, rc_probe.ProbeResult], tmp_path: Path) -> None:
    """The layers that correspond are those after blocks of the same weights."""
    model, before = whole
    pruned = measured(cut(model, 2, 4))
    layers = [0, 1, 3, 5]
    drops = {n: curve(before)[layer] - curve(pruned)[n] for n, layer in enumerate(layers)}
    worse = max(drops.values()) > 0  # than the whole, at some layer
    first, second = (pruned, before) if worse else (before, pruned)
    drops = drops if worse else {layers[n]: -drop for n, drop in drops.items()}
    second.save(tmp_path / "before")
    most = max(drops.values())
    (outcome,) = first.fail_if(baseline=tmp_path / "before", max_drop=f"{most + 1e-6}")
    assert outcome.value == pytest.approx(most, rel=1e-12, abs=1e-15)
    assert drops[outcome.layer] == most > 1e-3
    with pytest.raises(AssertionError, match="at layer"):
        first.fail_if(baseline=tmp_path / "before", max_drop=f"{most - 1e-6}")
    for one, other, pairs in (
        (before, pruned, zip(layers, range(4), strict=True)),
        (pruned, before, zip(range(4), layers, strict=True)),
    ):
        tables = rc_probe.compare(one, other).tables
        changes = tables["changes"].query("metric == 'residual'")
        wanted = [(b, curve(other)[b] - curve(one)[a]) for a, b in pairs]
        assert list(zip(changes["layer"], changes["change"], strict=True)) == [
            (b, pytest.approx(c)) for b, c in wanted
        ]
    table = rc_probe.compare(before, pruned).tables["residuals"]
    mine = table[(table["run"] == table["run"].iloc[-1]) & (table["variant"] == "transformer")]
    assert mine["depth"].tolist() == [0, 0.2, 0.6, 1.0]


def test_models_whose_blocks_do_not_correspond_are_refused(
    whole: tuple[Any, rc_probe.ProbeResult], tmp_path: Path
) -> None:
    model, before = whole
    other = cut(model, 2)
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight[0, 0] += 1
    before.save(tmp_path / "whole")
    with pytest.raises(RcProbeError, match="5 layers and this model 4, and their weights do not say"):
        measured(other).fail_if(baseline=tmp_path / "whole", max_drop="0.1")
    assert "changes" not in rc_probe.compare(before, measured(other)).tables


def test_the_encoder_of_t5_below_the_float_floor() -> None:
    """The recursion gives what the attention alone gives, block by block in float64."""
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 2}
    model = made("T5ForConditionalGeneration", "T5Config", **sizes, decoder_start_token_id=0).float()
    options = {"init": False, "paths": False, "metrics": "residual", "stack": "encoder"}
    result = rc_probe.probe(model, [words(6)], processor=tokenizer(), **options)
    exact, ids = copy.deepcopy(model).double(), tokenizer()(words(6), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        streams, bias = [exact.shared(ids)], None
        for block in exact.encoder.block:
            layer = block.layer[0]
            x, bias = layer.SelfAttention(layer.layer_norm(streams[-1]), position_bias=bias)[:2]
            streams.append(x)
    wanted = residuals([x.numpy() for x in streams])
    assert result.tables["recursion"]["residual"].tolist() == pytest.approx(wanted, rel=1e-6)
