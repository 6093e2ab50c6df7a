"""Checkpoints and configs that do not belong together: no verdict on a model that nobody trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import tiny

from rc_probe.hooks.errors import RcProbeError
from rc_probe.models.load import load_model

SWITCH = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2} | {
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2, "expert_capacity": 64,
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip


def without(folder: str, drop: Callable[[str], bool]) -> list[str]:
    """Take weights out of a checkpoint; their names."""
    file = Path(folder) / "model.safetensors"
    weights = load_file(file)
    gone = sorted(name for name in weights if drop(name))
    save_file({name: w for name, w in weights.items() if name not in gone}, file, metadata={"format": "pt"})
    return gone


def refuses(folder: str, *parts: str) -> None:
    with pytest.raises(RcProbeError) as error:
        load_model(folder, device="cpu")
    assert all(part in str(error.value) for part in parts), error.value


def test_a_router_is_no_head_of_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(**SWITCH)
    )
    folder = tiny.saved(tmp_path / "switch", model, tiny.tokenizer())
    gone = without(folder, lambda name: "router.classifier" in name)
    assert gone
    refuses(folder, f"{len(gone)} weights are not in the checkpoint and would be random", "router.classifier")


@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM"])
def test_blocks_of_the_checkpoint_that_the_config_does_not_use(tmp_path: Path, cls: str) -> None:
    folder = tiny.saved(tmp_path / "bert", tiny.bert(cls), tiny.tokenizer())
    file = Path(folder) / "config.json"
    config: dict[str, Any] = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    refuses(folder, "blocks of the checkpoint are not used", "encoder.layer.1", "config.json")
    file.write_text(
        json.dumps(config | {"num_hidden_layers": 1, "architectures": ["BertForSequenceClassification"]})
    )
    refuses(folder, "blocks of the checkpoint are not used", "encoder.layer.1")


def test_a_head_that_is_not_used_is_a_note(tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "bert", tiny.bert("BertForMaskedLM"), tiny.tokenizer())
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["BertModel"]}))
    missing, unused = load_model(folder, device="cpu").notes
    assert missing.startswith(
        "Not in the checkpoint, so random, but no stream depends on it: pooler.dense.bias"
    )
    assert unused.startswith("In the checkpoint, but not used by BertModel: cls.predictions")


@pytest.mark.parametrize(
    "content", ["[]", "5", "null", '{"model_type": 5}', '{"model_type": "bert", "architectures": [1, null]}', "[" * 100_000,
                '{"model_type": "bert", "num_hidden_layers": "two"}', '{"model_type": "bert", "hidden_size": 1e400}'],
)  # fmt: skip
def test_a_config_of_another_form(tmp_path: Path, content: str) -> None:
    folder = tiny.saved(tmp_path / "bert", tiny.bert(), tiny.tokenizer())
    (Path(folder) / "config.json").write_text(content)
    with pytest.raises(RcProbeError) as error:
        load_model(folder, device="cpu")
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
