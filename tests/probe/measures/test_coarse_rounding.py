"""Floors of quantised models: against a copy with the same weights in floating point, by plain hidden states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import tiny
from torch import nn

import rc_probe
from rc_probe import engine
from rc_probe.data.batches import Batch
from rc_probe.hooks.attach import find_structure
from rc_probe.hooks.edits.edits import Edits
from rc_probe.integrations.monitor import Monitor
from rc_probe.measures.coarse_rounding import measured_noise, name_of_rounding, quantised
from rc_probe.measures.variant_passes import CurveReader

BATCH = {
    "input_ids": torch.tensor([[1, 5, 9, 14, 22, 2], [1, 7, 8, 2, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
}


def plain() -> Any:
    torch.manual_seed(0)
    return tiny.bert(hidden_size=32, intermediate_size=64, initializer_range=0.2).eval()


def by_torchao(how: str) -> Any:
    torchao = pytest.importorskip("torchao.quantization")
    model = plain()
    torchao.quantize_(model, getattr(torchao, how)())
    return model


def states(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [x.double() for x in model(**BATCH, output_hidden_states=True).hidden_states]


def by_hand(model: Any) -> list[float]:
    """Of each layer √ mean_i (‖δ_i − δ̄‖ / ‖x_i‖)², sample by sample, δ against the weights in floats."""
    floats = copy.deepcopy(plain())
    for name, module in quantised(model).items():
        stored: Any = module.weight
        target: Any = floats.get_submodule(name)
        target.weight = nn.Parameter(stored.dequantize().float())
    found = []
    for x, y in zip(states(model), states(floats), strict=True):
        squares = []
        for row, length in enumerate((6, 4)):
            delta = (x - y)[row, :length]
            delta = delta - delta.mean(0)
            squares += [
                float(d.norm() / one.norm()) ** 2 for d, one in zip(delta, x[row, :length], strict=True)
            ]
        found.append((sum(squares) / len(squares)) ** 0.5)
    return found


def test_activations_in_eight_bits() -> None:
    model = by_torchao("Int8DynamicActivationInt8WeightConfig")
    structure = find_structure(model, BATCH)
    batch = Batch(BATCH, BATCH["attention_mask"].bool())
    noise = measured_noise(structure, batch, {"transformer": Edits()})["transformer"]
    wanted = by_hand(model)
    assert [noise[layer] for layer in range(3)] == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    assert noise[0] == 0 and noise[2] > 1e-3
    assert not model.encoder.layer[0].output.dense._forward_hooks


def test_weights_alone_in_eight_bits_leave_the_floor_of_floats() -> None:
    model = by_torchao("Int8WeightOnlyConfig")
    noise = measured_noise(find_structure(model, BATCH), Batch(BATCH, None), {"transformer": Edits()})[
        "transformer"
    ]
    assert max(noise.values()) < 4.8e-7
    assert measured_noise(find_structure(plain(), BATCH), Batch(BATCH, None), {"transformer": Edits()}) == {}
    assert name_of_rounding(plain()) == ""


def test_a_run_says_it() -> None:
    model = by_torchao("Int8DynamicActivationInt8WeightConfig")
    options: dict[str, Any] = {"init": False, "paths": False, "recursion": False, "metrics": ["residual"]}
    result = rc_probe.probe(model, ["w1 w2 w3 w4 w5", "w6 w7"], processor=tiny.tokenizer(), **options)
    name = name_of_rounding(model)
    assert name and result.settings["dtype"] == f"float32, {name}" and name in " ".join(result.model["notes"])
    floors = result.tables["residuals"].query("variant == 'SAN'")["floor"].tolist()
    assert floors[0] < 1e-6 and floors[2] > 1e-4
    assert "--dtype float32 " in result.settings["command"]


def test_attach_and_a_monitor_have_the_measured_floors() -> None:
    """What they are attached with is what they measure here; the floor of a residual grows with its noise."""
    model = by_torchao("Int8DynamicActivationInt8WeightConfig")
    with torch.no_grad(), rc_probe.attach(model, inputs=BATCH) as probe:
        model(**BATCH)
    mine, monitor = probe.frame(), Monitor(model, [BATCH])
    monitor.measure()
    reader = CurveReader(["transformer"], ["residual"], 0)
    reader.curves["transformer"].noise = dict(enumerate(by_hand(model)))
    engine.run(find_structure(model, BATCH), [Batch(BATCH, BATCH["attention_mask"].bool())], {}, [reader])
    wanted = [row["floor"] for row in reader.curves["transformer"].rows()]
    for frame in (mine, monitor.frame()):
        assert frame.query("metric == 'residual'")["floor"].tolist() == pytest.approx(wanted, rel=1e-3)
    assert wanted[0] < 1e-6 and wanted[2] > 1e-4
    assert not model.encoder.layer[0].output.dense._forward_hooks
