"""What small models of the library hand on between their blocks, in float64, and its residuals by plain loops."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from support.loops import numpy_residual
from torch import Tensor, nn

SIZES = {
    "vocab_size": 70,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
GPT2 = {
    "vocab_size": 70,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.1,
}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {
    "vocab_size": 70,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
}
SEQ2SEQ |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.1}
SEQ2SEQ |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


def made(cls: str, config: str, **sizes: Any) -> Any:
    """A small model in float64, the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, cls)(getattr(transformers, config)(**sizes)).double().eval()


def gpt2(cls: str = "GPT2LMHeadModel", **changes: Any) -> Any:
    return made(cls, "GPT2Config", **(GPT2 | changes))


def ids(*lengths: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Texts of these lengths, padded on the right with 0, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(5, 70, mask.shape, generator=generator) * mask, mask.long()


def blocks_of(model: nn.Module, name: str) -> list[nn.Module]:
    return list(model.get_submodule(name))


def handed_on(blocks: Sequence[nn.Module], run: Callable[[], Any]) -> list[np.ndarray]:
    """What enters the first block and what each hands on, by plain hooks: (batch, tokens, dim) each."""
    found: list[np.ndarray] = []

    def first(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)).numpy().copy())

    def after(module: nn.Module, args: Any, output: Any) -> None:
        found.append((output if isinstance(output, Tensor) else output[0]).numpy().copy())

    handles = [blocks[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [block.register_forward_hook(after) for block in blocks]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return found


def residuals(streams: Sequence[np.ndarray], mask: Any = None) -> list[float]:
    """At each layer the mean over rows of two or more real tokens, mask (batch, tokens)."""
    curve = []
    for x in streams:
        rows = [
            row if mask is None else row[np.asarray(m, bool)]
            for row, m in zip(x, x if mask is None else mask, strict=True)
        ]
        curve.append(float(np.mean([numpy_residual(row) for row in rows if len(row) > 1])))
    return curve


def is_curve(frame: pd.DataFrame, wanted: list[float], count: int) -> None:
    """The residual of the frame is `wanted`, of `count` samples at every layer."""
    found = frame[frame["metric"] == "residual"]
    assert found["count"].eq(count).all()
    assert found["mean"].tolist() == pytest.approx(wanted, rel=1e-9)
