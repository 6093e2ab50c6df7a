"""What large models need: their own dtype, weights held once, and costs chosen from shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support import tiny
from support.loops import TEXTS, numpy_residual, tokenized

import rc_probe

LLAMA = tiny.SIZES | {"num_key_value_heads": 1}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small decoder stored in bfloat16."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, initializer_range=0.3))
    return tiny.saved(tmp_path_factory.mktemp("half"), model.to(torch.bfloat16), tiny.tokenizer())


def test_a_checkpoint_in_bfloat16_is_measured_in_it(half: str, tmp_path: Path) -> None:
    """The statistics of its own streams, in float64 beside; floors are those of bfloat16."""
    found = rc_probe.probe(half, TEXTS, paths=False, chains=False, init=False, metrics=["residual"])
    assert found.settings["dtype"] == "bfloat16" and "--dtype" not in found.settings["command"]
    rows = found.residuals[found.residuals["variant"] == "transformer"].set_index("layer")
    model = transformers.LlamaForCausalLM.from_pretrained(half, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        runs = [model(**one, output_hidden_states=True).hidden_states for one in tokenized(tiny.tokenizer())]
    for layer in (0, 1):  # the library norms the last one
        wanted = np.mean([numpy_residual(run[layer][0].double().numpy()) for run in runs])
        assert rows["mean"][layer] == pytest.approx(wanted, rel=0.02)  # padded, a batch rounds otherwise
    full = rc_probe.probe(
        half, TEXTS, dtype="float32", paths=False, chains=False, init=False, metrics=["residual"]
    )
    assert full.settings["dtype"] == "float32" and "--dtype float32" in full.settings["command"]
    of = full.residuals[full.residuals["variant"] == "transformer"].set_index("layer")
    assert rows["floor"][1] / of["floor"][1] == pytest.approx(2**16, rel=0.02)
    assert "bfloat16" in found.to_html()
