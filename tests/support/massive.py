"""A small GPT-2 that makes a token massive, and the others equal or not; nothing of it is trained."""

from typing import Any

import torch
import transformers

WIDTH, MARK, WHERE, COMMON = 32, 0, 5, 9


def gpt2(size: float, *, equal: bool, places: tuple[int, ...] = (0,)) -> Any:
    """Block 2 writes `size` at the positions `places`, and where `equal` adds the same large vector to all tokens.

    These positions carry a mark in one coordinate, which no other token has; one unit of the MLP fires on it.
    """
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=WIDTH, n_layer=3, n_head=4, n_positions=160, bos_token_id=1, eos_token_id=2,
        attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight[:, MARK] = 0
        model.transformer.wpe.weight[:, MARK] = 0
        model.transformer.wpe.weight[list(places), MARK] = 0.5
        mlp = model.transformer.h[1].mlp
        mlp.c_fc.weight[MARK, 0] = 10.0  # after the norm the mark is above 4, what others have there below 1
        mlp.c_fc.bias[0] = -25.0
        mlp.c_proj.weight[0, WHERE] = size / 20
        if equal:
            mlp.c_proj.bias[COMMON] = 20.0
    return model
