"""Which part of a model of several modalities is measured."""

from typing import Any

import pytest
import torch
import transformers
from support import zoo
from support.odd_models import clip, t5
from support.random_models import randomise

from rc_probe import RcProbeError
from rc_probe.models.towers import pick


def llava() -> Any:
    text = transformers.LlamaConfig(**zoo.LLAMA)
    vision = transformers.CLIPVisionConfig(**zoo.VIT)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=3)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    randomise(model, torch.float32)
    return model


def whisper() -> Any:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8, "vocab_size": 50}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_source_positions": 20}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    config = transformers.WhisperConfig(
        **sizes, **heads, **ids, encoder_ffn_dim=32, decoder_ffn_dim=32, max_target_positions=20
    )
    return transformers.WhisperModel(config).eval()


def test_a_model_of_one_modality_is_measured_whole() -> None:
    model, _ = zoo.build("bert")
    assert pick(model, None).model is model
    part = pick(t5(), "encoder")
    assert (part.name, part.stack) == ("", "encoder")


def test_towers_of_a_dual_encoder() -> None:
    model, _ = clip()
    text = pick(model, None)
    assert (text.model, text.stack) == (model.text_model, "encoder.layers")
    assert text.others == ("vision_model.encoder.layers",)
    vision = pick(model, "vision")
    assert (vision.model, vision.stack) == (model.vision_model, "encoder.layers")


def test_a_text_goes_through_the_whole_of_a_vision_language_model() -> None:
    model = llava()
    text = pick(model, None)
    assert text.model is model
    assert text.stack == "model.language_model.layers"
    vision = pick(model, "vision_tower")
    assert type(vision.model).__name__ == "CLIPVisionModel"
    assert pick(model, "language_model") == text


def test_of_speech_to_text_the_encoder() -> None:
    model = whisper()
    part = pick(model, None)
    assert (part.model, part.stack, part.others) == (model.encoder, "layers", ())
    with pytest.raises(RcProbeError, match="no stack is named 'decoder'"):  # it would run without the sound
        pick(model, "decoder")


def test_no_such_tower() -> None:
    model, _ = clip()
    with pytest.raises(RcProbeError, match=r"no stack is named 'audio'.*'vision_model\.encoder\.layers'"):
        pick(model, "audio")
