"""Sounds, and a small model that hears."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from support import tiny

from rc_probe.models.load import Loaded

RATE = 16000
CONV = {"conv_dim": (8, 8), "conv_kernel": (10, 4), "conv_stride": (5, 4), "num_feat_extract_layers": 2}
WAV2VEC2 = tiny.VIT_SIZES | CONV | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
WHISPER = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32} | {
    "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "num_mel_bins": 8,
    "max_source_positions": 50, "classifier_proj_size": 8, "vocab_size": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
AST = tiny.VIT_SIZES | {"max_length": 32, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4}


def extractor(name: str) -> Any:
    """The feature extractor of the tiny model."""
    options: dict[str, dict[str, Any]] = {
        "Wav2Vec2": {"return_attention_mask": True},
        "Whisper": {"feature_size": 8, "chunk_length": 1},
        "AST": {"num_mel_bins": 16, "max_length": 32},
        "SeamlessM4T": {"num_mel_bins": 8},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few bins
        return getattr(transformers, f"{name}FeatureExtractor")(**options[name])


def model(name: str) -> Any:
    torch.manual_seed(0)
    if name == "Whisper":  # its encoder alone
        return transformers.WhisperForAudioClassification(transformers.WhisperConfig(**WHISPER)).eval()
    if name == "SeamlessM4T":
        sizes = tiny.VIT_SIZES | {"feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3}
        return transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig(**sizes)).eval()
    sizes = AST if name == "AST" else WAV2VEC2
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}Model")(config).eval()


def held(name: str) -> Loaded:
    one = model(name)
    return Loaded(one, one.config, name, None, "audio", extractor(name))


def sound(seconds: float = 0.1, rate: int = RATE, seed: int = 0) -> Any:
    """A few tones below 3 kHz, (N,) float32."""
    time = np.arange(round(seconds * rate)) / rate
    tones = np.random.default_rng(seed).uniform(200, 3000, 4)
    return (0.2 * np.sin(2 * np.pi * tones[:, None] * time).sum(0)).astype(np.float32)


def write(path: Path, values: Any = None, rate: int = RATE) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    soundfile.write(path, sound() if values is None else values, rate)
    return path
