"""Small trainers."""

from pathlib import Path
from typing import Any

import torch
import transformers
from support import tiny

TEXTS = [tiny.words(3 + i % 6, 1 + i) for i in range(12)]


def fresh(cls: str = "BertForSequenceClassification", **changes: Any) -> Any:
    """The same random weights at every call; dropout on."""
    torch.manual_seed(3)
    return tiny.bert(cls, hidden_dropout_prob=0.3, **changes)


def rows(tokenizer: Any) -> list[dict[str, Any]]:
    return [{**tokenizer(text), "labels": i % 2, "name": text} for i, text in enumerate(TEXTS)]


def make_trainer(folder: Path, model: Any = None, **options: Any) -> transformers.Trainer:
    tokenizer = tiny.tokenizer()
    callbacks = options.pop("callbacks", None)
    how = {
        "use_cpu": True, "max_steps": 6, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
        "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2, "save_strategy": "no", "learning_rate": 1e-2,
        "disable_tqdm": True, "report_to": [], "seed": 5,
    }  # fmt: skip
    return transformers.Trainer(
        model or fresh(), transformers.TrainingArguments(str(folder), **how | options),
        train_dataset=rows(tokenizer), eval_dataset=rows(tokenizer), processing_class=tokenizer, callbacks=callbacks,
    )  # fmt: skip
