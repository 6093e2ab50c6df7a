"""Tiny models trained for a few seconds, so that there is something to predict: the walks of a small language.

The 28 words of tests/tiny.py are 4 rings of 7. A walk goes round one ring in steps of 1, 2 or 3. Two words tell the
ring and the step, so the next word, a hidden word and the step itself can be known; one word alone does not tell.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from support import tiny

from rc_probe.models.load import Loaded

STEPS = ("one", "two", "three")
RINGS, AROUND = 4, 7
FIRST_ID = 4  # of w0; the special tokens come before
MASK = 32
BERT = tiny.SIZES | {"vocab_size": 33, "hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.2} | {
    "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0,
}  # fmt: skip
GPT2 = tiny.GPT2_SIZES | {
    "n_embd": 32,
    "initializer_range": 0.2,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
}


def walks(count: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """(texts of 6 to 14 words, the number of each one's step in STEPS)."""
    generator = torch.Generator().manual_seed(seed)
    ids, steps = _walks(count, 14, generator)
    lengths = torch.randint(6, 15, (count,), generator=generator).tolist()
    texts = [
        [tiny.VOCABULARY[i] for i in row[:length]] for row, length in zip(ids.tolist(), lengths, strict=True)
    ]
    return [" ".join(text) for text in texts], steps.tolist()


def _walks(count: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids (count, length), steps (count,))"""
    ring, start, step = (
        torch.randint(high, (count, 1), generator=generator) for high in (RINGS, AROUND, len(STEPS))
    )
    return FIRST_ID + AROUND * ring + (start + (step + 1) * torch.arange(length)) % AROUND, step[:, 0]


def tokenizer(**options: Any) -> Any:
    made = tiny.tokenizer(**options)
    made.add_special_tokens({"mask_token": "[MASK]"})
    return made


Inputs = dict[str, torch.Tensor]


def _train(
    model: Any, inputs: Callable[[torch.Tensor, torch.Tensor, torch.Generator], Inputs], steps: int
) -> Any:
    """AdamW on batches of 64 walks of 12 words; `inputs(ids, steps, generator)` holds the labels, too."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1e-2, total_steps=steps)
    model.train()
    for _ in range(steps):
        ids, kinds = _walks(64, 12, generator)
        model(**inputs(ids, kinds, generator)).loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return model.eval()


def _loaded(model: Any, processor: Any) -> Loaded:
    return Loaded(model, model.config, type(model).__name__, None, "text", processor)


def causal() -> Loaded:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    made = _train(model, lambda ids, steps, generator: {"input_ids": ids, "labels": ids}, 120)
    return _loaded(made, tiny.tokenizer(pad=False, special=False))


def masked() -> Loaded:
    torch.manual_seed(0)

    def hide(ids: torch.Tensor, steps: torch.Tensor, generator: torch.Generator) -> Inputs:
        hidden = torch.rand(ids.shape, generator=generator) < 0.15
        hidden[:, 3] = True
        labels = _around(ids.masked_fill(~hidden, -100))
        return {
            "input_ids": _around(ids.masked_fill(hidden, MASK)),
            "labels": labels.where(labels >= FIRST_ID, -100),
        }

    return _loaded(_train(tiny.bert("BertForMaskedLM", **BERT), hide, 300), tokenizer())


def classifier() -> Loaded:
    """Its classes are the names of the steps."""
    torch.manual_seed(0)
    names = dict(enumerate(STEPS))
    model = tiny.bert(
        "BertForSequenceClassification", **BERT, id2label=names, label2id={n: i for i, n in names.items()}
    )
    made = _train(model, lambda ids, steps, generator: {"input_ids": _around(ids), "labels": steps}, 200)
    return _loaded(made, tokenizer())


def _around(ids: torch.Tensor) -> torch.Tensor:
    """[CLS] ids [SEP]"""
    return torch.cat([torch.full_like(ids[:, :1], 1), ids, torch.full_like(ids[:, :1], 2)], dim=1)
