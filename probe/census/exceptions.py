"""What the general rules of sizes and classes cannot know: a row for each such type, with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """An exception: config values by dotted name, or the class to build."""

    reason: str
    config: Mapping[str, Any] = {}
    cls: str | None = None
    whole: bool = False  # a hierarchy keeps all its stages


_MISSING = "the library's default config lacks what its model needs"
_KINDS = "the default config names no attention layer that a short model would have"

EXCEPTIONS: dict[str, Row] = {
    "align": Row("the projection is as wide as the image tower's last stage", {"projection_dim": 48}),
    "bamba": Row(_KINDS, {"attn_layer_indices": [1]}),
    "chameleon": Row(_MISSING, {"vocabulary_map": {"<image>": 4, "IMGIMGA": 5, "IMGIMGB": 6}}),
    "clvp": Row(
        "32 dimensions of a head turn", {"text_config.hidden_size": 128, "speech_config.hidden_size": 128}
    ),
    "clvp_encoder": Row("32 dimensions of a head turn", {"hidden_size": 128}),
    "dbrx": Row(_MISSING, {"attn_config.rope_theta": 10000.0}),
    "deepseek_ocr2_text": Row(_MISSING, {"mlp_layer_types": ["dense", "sparse", "sparse"]}),
    "deepseek_ocr2": Row(_MISSING, {"text_config.mlp_layer_types": ["dense", "sparse", "sparse"]}),
    "deepseek_v2": Row(_MISSING, {"num_experts_per_tok": 2}),
    "dots1": Row(_MISSING, {"n_shared_experts": 1, "num_experts_per_tok": 2}),
    "efficientnet": Row("the width follows from a coefficient", {"hidden_dim": 2560}),
    "esm": Row(_MISSING, {"pad_token_id": 1, "mask_token_id": 3}),
    "gpt_neo": Row(
        "layers are counted in pairs", {"attention_types": [[["global", "local"], 1], [["global"], 1]]}
    ),
    "granite4_vision": Row(_MISSING, {"deepstack_layer_map": [[-2, 0]]}),
    "granitemoehybrid": Row(_KINDS, {"layer_types": ["mamba", "attention", "mamba"]}),
    "lfm2_moe": Row(_MISSING, {"layer_types": ["conv", "full_attention", "conv"]}),
    "mamba2": Row("heads x width = 2 x 64", {"head_dim": 32}),
    "qwen3_omni_moe_talker_text": Row(_MISSING, {"shared_expert_intermediate_size": 64}),
    "speecht5": Row("the base model takes features, not sound", cls="SpeechT5ForSpeechToText"),
    "t5gemma2_decoder": Row(_MISSING, {"dropout_rate": 0.0}),
    "t5gemma2_text": Row(_MISSING, {"dropout_rate": 0.0}),
}
