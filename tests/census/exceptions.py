"""What the general rules of sizes and classes cannot know: a row for each such type, with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Change(NamedTuple):
    """An exception: config values by dotted name, or the class to build."""

    reason: str
    config: Mapping[str, Any] = {}
    cls: str | None = None
    whole: bool = False  # a hierarchy keeps all its stages


_MISSING = "the library's default config lacks what its model needs"
_KINDS = "the default config names no attention layer that a short model would have"

_SECTIONS = "the default rope has sections that a small head cannot hold"
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}

_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
_EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}

EXCEPTIONS: dict[str, Change] = {
    "align": Change("the projection is as wide as the image tower's last stage", {"projection_dim": 48}),
    "bamba": Change(_KINDS, {"attn_layer_indices": [1]}),
    "chameleon": Change(_MISSING, {"vocabulary_map": {"<image>": 4, "IMGIMGA": 5, "IMGIMGB": 6}}),
    "clvp": Change(
        "32 dimensions of a head turn", {"text_config.hidden_size": 128, "speech_config.hidden_size": 128}
    ),
    "clvp_encoder": Change("32 dimensions of a head turn", {"hidden_size": 128}),
    "dbrx": Change(_MISSING, {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0}),
    "deepseek_ocr2_text": Change(_MISSING, {"mlp_layer_types": ["dense", "sparse", "sparse"]}),
    "deepseek_ocr2": Change(_MISSING, {"text_config.mlp_layer_types": ["dense", "sparse", "sparse"]}),
    "deepseek_v2": Change(_MISSING, {"num_experts_per_tok": 2}),
    "dots1": Change(_MISSING, {"n_shared_experts": 1, "num_experts_per_tok": 2}),
    "efficientnet": Change("the width follows from a coefficient", {"hidden_dim": 2560}),
    "esm": Change(_MISSING, {"pad_token_id": 1, "mask_token_id": 3}),
    "gpt_neo": Change(
        "layers are counted in pairs", {"attention_types": [[["global", "local"], 1], [["global"], 1]]}
    ),
    "granite4_vision": Change(_MISSING, {"deepstack_layer_map": [[-2, 0]]}),
    "granitemoehybrid": Change(_KINDS, {"layer_types": ["mamba", "attention", "mamba"]}),
    "lfm2_moe": Change(_MISSING, {"layer_types": ["conv", "full_attention", "conv"]}),
    "mamba2": Change("heads x width = 2 x 64", {"head_dim": 32}),
    "qwen3_omni_moe_talker_text": Change(_MISSING, {"shared_expert_intermediate_size": 64}),
    "speecht5": Change("the base model takes features, not sound", cls="SpeechT5ForSpeechToText"),
    "t5gemma2_decoder": Change(_MISSING, {"dropout_rate": 0.0}),
    "t5gemma2_text": Change(_MISSING, {"dropout_rate": 0.0}),
    "aria": Change("a table from patches to queries", {"projector_patch_to_query_dict": {16: 4}}),
    "llama4": Change("pixel shuffle: 4 x 64 at the adapter", {"vision_config.intermediate_size": 256}),
    "llama4_vision_model": Change("pixel shuffle: 4 x 64 at the adapter", {"intermediate_size": 256}),
    "mllama": Change(
        "the tower gives its last and some inner layers, side by side",
        {"vision_config.intermediate_layers_indices": [0, 1], "vision_config.vision_output_dim": 192},
    ),
    "mllama_vision_model": Change(
        "the tower gives its last and some inner layers, side by side",
        {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192},
    ),
    "granite_speech": Change("queries = window // rate", {"window_size": 15}),
    "granite_speech_plus": Change("queries = window // rate", {"window_size": 15}),
    "layoutlmv3": Change(
        "4 coordinates and 2 shapes fill the width", {"coordinate_size": 11, "shape_size": 10}
    ),
    "lilt": Change("6 coordinates fill the width", {"hidden_size": 96}),
    "longcat_flash": Change("the head's width is that of its turned part", {"head_dim": 8}),
    "reformer": Change(
        "axes of the positions", {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16]}
    ),
    "xmod": Change(_MISSING, {"default_language": "en_XX"}),
    "step3p5": Change(_MISSING, {"sliding_window": 8}),
    "step3p7": Change(_MISSING, {"text_config.sliding_window": 8}),
    "t5gemma2_encoder": Change(_MISSING, {"text_config.dropout_rate": 0.0}),
    "superpoint": Change("8 x 8 places and none", {"keypoint_decoder_dim": 65}),
    "lightglue": Change("8 x 8 places and none", {"keypoint_detector_config.keypoint_decoder_dim": 65}),
    "superglue": Change("8 x 8 places and none", {"keypoint_detector_config.keypoint_decoder_dim": 65}),
    "paddleocr_vl_text": Change(_SECTIONS, {"rope_parameters": _ROPE}),
    "paddleocr_vl": Change(_SECTIONS, {"text_config.rope_parameters": _ROPE}),
    "qwen2_5_omni_thinker": Change(_MISSING, {"vision_start_token_id": 33, "vision_end_token_id": 34}),
    "qwen3_omni_moe_thinker": Change(_MISSING, {"vision_start_token_id": 33, "vision_end_token_id": 34}),
    "tvp": Change("the prompt is a frame within the image", {"visual_prompt_size": 4, "max_img_size": 32}),
    "seggpt": Change(
        "layers whose states are used", {"merge_index": 0, "intermediate_hidden_state_indices": [1, 2]}
    ),
    "depth_pro": Change(
        "a patch is the inner model's image", {"patch_size": 32, "intermediate_hook_ids": [2, 1]}
    ),
    "zamba": Change(
        "two layers share their attention",
        {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    ),
    "blt": Change(_MISSING, {"num_hidden_layers": 3}),
    "diffusion_gemma_text": Change(_MISSING, _EXPERTS),
    "diffusion_gemma": Change(_MISSING, {f"text_config.{name}": value for name, value in _EXPERTS.items()}),
    "glm5_next_text": Change("the best tokens are chosen in pools of 16", {"index_topk": 16}),
    "glm5_next": Change("the best tokens are chosen in pools of 16", {"text_config.index_topk": 16}),
    "molmo2": Change("layers of another config", {"adapter_config.vision_feature_layer": [2, 1]}),
    "ernie4_5_vl_moe_text": Change(_SECTIONS, {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}}),
    "ernie4_5_vl_moe": Change(
        _SECTIONS, {"text_config.rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}}
    ),
    "clap": Change("the last of four stages is 8 x 16 wide", {"audio_config.hidden_size": 128}),
    "falcon_h1": Change("heads x width of the state", {"mamba_d_ssm": 128, "mamba_d_head": 32}),
    "vits": Change(
        "without noise, or no two passes agree", {"noise_scale": 0.0, "noise_scale_duration": 0.0}
    ),
    "shieldgemma2": Change(_MISSING, {"yes_token_index": 50, "no_token_index": 51}),
    "xlstm": Change("keys as wide as values", {"qk_dim_factor": 1.0}),
    "cohere_compass_text": Change(_MISSING, {"rope_parameters": {"full_attention": _PLAIN}}),
    "cohere_compass": Change(_MISSING, {"text_config.rope_parameters": {"full_attention": _PLAIN}}),
    "qwen4_exp_text": Change(_MISSING, _INDEXER),
    "qwen4_exp": Change(_MISSING, {f"text_config.{name}": value for name, value in _INDEXER.items()}),
    "musicgen": Change("the base model takes the decoder's config", cls="MusicgenForConditionalGeneration"),
    "musicgen_melody": Change(
        "the base model takes the decoder's config", cls="MusicgenMelodyForConditionalGeneration"
    ),
    "moonshine_streaming": Change(_MISSING, {"num_key_value_heads": 4, "num_attention_heads": 4}),
    **{
        name: Change("its lists of stages differ in length", whole=True)
        for name in (
            *("hiera", "levit", "mobilevit", "sam2", "sam2_hiera_det_model", "sam2_vision_model", "textnet"),
            *("uvdoc", "slanet", "vibevoice", "vibevoice_acoustic_tokenizer", "vibevoice_asr"),
            *("vibevoice_acoustic_tokenizer_encoder", "vibevoice_acoustic_tokenizer_decoder"),
            *("pp_lcnet_v4", "pp_ocrv6_small_det", "pp_ocrv6_small_rec", "pp_ocrv6_tiny_rec", "mimi_encoder"),
        )
    },
}
