"""Massive tokens do not speak for the others: level, checks, callbacks and the table that names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import massive, tiny, zoo
from support.loops import numpy_residual
from support.streams import streams
from support.training import make_trainer

import rc_probe
from rc_probe.cli.app import main
from rc_probe.data.batches import Batch
from rc_probe.hooks.attach import find_structure
from rc_probe.integrations.monitor import Monitor
from rc_probe.measures.massive_reader import MassiveReader
from rc_probe.metrics.stream_metrics import measure

FAST: dict[str, Any] = {
    "init": False,
    "recursion": False,
    "paths": False,
    "metrics": ("residual", "residual_bulk"),
}
SIZES = [2.9e4, 2.8e5, 2.8e6]


def texts(tokens: int) -> list[str]:
    return [tiny.words(tokens, step) for step in (1, 3, 5)]


def probed(model: Any, tokens: int) -> rc_probe.ProbeResult:
    return rc_probe.probe(model, texts(tokens), processor=tiny.tokenizer(special=False), **FAST)


@pytest.mark.parametrize("tokens", [16, 128])
@pytest.mark.parametrize(("size", "places"), [*((size, (0,)) for size in SIZES), (2.8e5, (0, 3))])
def test_a_collapse_behind_massive_tokens_is_seen(size: float, places: tuple[int, ...], tokens: int) -> None:
    model = massive.gpt2(size, equal=True, places=places)
    result = probed(model, tokens)
    paper = result.residuals.query("metric == 'residual' and variant == 'transformer'")["mean"].tolist()
    bulk = result.residuals.query("metric == 'residual_bulk' and variant == 'transformer'")["mean"].tolist()
    assert paper[2] > 0.9, "the paper's residual says apart"
    assert bulk[2] < 0.02 and result.verdict["level"] == "collapsed"
    with torch.no_grad():
        ids = tiny.tokenizer(special=False)(texts(tokens)[0], return_tensors="pt")["input_ids"]
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    keep = [t for t in range(tokens) if t not in places]
    x = states[2][0, keep].double().numpy()
    one = rc_probe.probe(model, texts(tokens)[:1], processor=tiny.tokenizer(special=False), **FAST).residuals
    found = one.query("metric == 'residual_bulk' and variant == 'transformer' and layer == 2")["mean"].item()
    assert found == pytest.approx(numpy_residual(x), rel=1e-4)
    found_places = result.tables["massive"].query("layer == 2")
    assert sorted(set(found_places["position"])) == [place + 1 for place in places]
    assert set(found_places["coordinate"]) == {massive.WHERE}
    assert "position 1 (“w0”) in 3 of 3 texts, layers 2 to 3, up to" in result.verdict["massive"]["sentence"]


@pytest.mark.parametrize("size", SIZES)
def test_one_massive_token_among_healthy_ones_is_no_collapse(size: float) -> None:
    result = probed(massive.gpt2(size, equal=False), 16)
    assert result.verdict["level"] == "healthy"
    assert "relative residual of the bulk" in result.verdict["sentence"]
    assert any("as the paper defines it" in reason for reason in result.verdict["reasons"])


@pytest.mark.parametrize(("equal", "code"), [(True, 1), (False, 0)])
def test_a_check_of_the_bulk_ends_the_command(equal: bool, code: int, tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "m", massive.gpt2(2.8e5, equal=equal), tiny.tokenizer(special=False))
    (tmp_path / "t.txt").write_text("\n".join(texts(16)))
    words = [
        folder,
        "--data",
        str(tmp_path / "t.txt"),
        "--no-init",
        "--no-recursion",
        "--no-paths",
        "--quiet",
    ]
    with pytest.raises(SystemExit) as end:
        main([*words, "--out", str(tmp_path / "o"), "--fail-if", "residual_bulk@last<0.1"])
    assert end.value.code == code


@pytest.mark.parametrize("equal", [True, False])
def test_monitors_report_the_layer(equal: bool, tmp_path: Path) -> None:
    model = massive.gpt2(2.8e5, equal=equal)
    told = Monitor(model, texts(16), processor=tiny.tokenizer(special=False)).measure()
    assert told["collapse_layer"] == (2 if equal else 4)
    assert told["residual_last"] > 0.9
    data = [tiny.tokenizer(special=False)(text) for text in texts(16)]
    trainer = make_trainer(tmp_path, model)
    watched = rc_probe.watch(trainer, texts(16), processor=tiny.tokenizer(special=False))
    assert trainer.model is model and len(data) == 3
    read = watched.read(model, None, 0)
    assert read["eval_collapse_layer"] == told["collapse_layer"]
    watched.remove()


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_where_no_token_is_massive_the_bulk_is_all_bitwise(name: str) -> None:
    model, inputs = zoo.build(name)
    structure = find_structure(model, inputs)
    mask = inputs.get("attention_mask")
    for layer, x in enumerate(streams(structure, inputs)):
        found = measure(x, mask, ["residual", "residual_bulk", "massive_share"])
        assert float(found["massive_share"][0].max()) == 0, layer
        assert torch.equal(found["residual"][0], found["residual_bulk"][0]), layer


def test_the_table_by_hand() -> None:
    """Two texts in one batch, the second padded on the left: positions count real tokens."""
    x = torch.zeros(2, 6, 4)
    x[..., 1] = 1.0
    x[0, 2] = torch.tensor([0.0, 6.0, 8.0, 0.0])  # norm 10
    x[1, 4] = torch.tensor([0.0, 0.0, 0.0, 20.0])
    mask = torch.tensor([[True] * 6, [False, False, True, True, True, True]])
    ids = torch.tensor([[7, 8, 9, 9, 9, 9], [0, 0, 5, 6, 9, 9]])
    reader = MassiveReader((3, 5, 10))
    for _ in range(2):
        reader.begin(Batch({"input_ids": ids}, mask))
        reader.plain(1, x)
    whole = MassiveReader.merged([reader.pack(), reader.pack()])
    assert whole.rows(20, str) == [
        {"layer": 1, "position": 3, "token": "9", "samples": 8, "norm_over_median": 15.0, "coordinate": 2,
         "coordinate_share": pytest.approx((0.64 + 1) / 2)},
    ]  # fmt: skip
    assert [(row["massive"], row["layer"]) for row in whole.level_rows()] == [(3, 1), (5, 1), (10, 1)]
    none, five, ten = (row["mean"] for row in whole.level_rows())
    assert none == five == 0.0  # what is left are equal tokens
    alone = float(measure(x[:1], None, ["residual"])["residual"][0])
    assert ten == pytest.approx((alone + 0.0) / 2), "a token of ten times is not over ten times"
    assert whole.rows(0, str) == []
