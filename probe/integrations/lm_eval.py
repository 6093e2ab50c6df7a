"""lm-evaluation-harness: accuracy without parts of a model, from the harness itself, and its tasks' texts as data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from rc_probe.contexts import ablate
from rc_probe.data.lm_eval_texts import SCHEME, explained, library, task_manager, task_texts
from rc_probe.hooks.errors import RcProbeError
from rc_probe.interventions.grammar import parse_intervention
from rc_probe.models.libraries import first_line
from rc_probe.results.tables import FRAMES, Row

if TYPE_CHECKING:
    import pandas as pd
BASELINE = "none"
TEXTS, LENGTH = 32, 128  # of each task, for interventions that go by data
Advance = Callable[[str, int, int], None]


def ablated_scores(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    ablations: Sequence[str] = (),
    *,
    limit: int | None = None,
    include_path: str | None = None,
    batch_size: int = 8,
    stack: str | None = None,
    blocks: str | None = None,
    progress: Advance = lambda stage, done, total: None,
    **options: Any,
) -> pd.DataFrame:
    """Scores of the harness's tasks, of the whole model and without each of `ablations`.

    One row per number, in the columns of `rc_probe.results.tables.FRAMES["lm_eval"]`. `limit` is of documents
    in each task; `include_path` a folder of task files of your own; `options` go to `lm_eval.simple_evaluate`.

    Raises RcProbeError for models that cannot be scored by their next tokens (encoders, models without a
    language-modelling head), tasks that are not there, and as `ablate` does.
    """
    by_data = [
        text for text in ablations if any(each.on_data for each in parse_intervention(text).interventions)
    ]
    refuse_encoders(model)
    lm_eval = library()
    readings = _texts_of(tasks, include_path, model, tokenizer) if by_data else None
    parts = [  # wrong ones are told now
        ablate(model, name, stack=stack, blocks=blocks, readings=readings if name in by_data else None)
        for name in ablations
    ]
    manager = task_manager(tasks, include_path)
    with explained(tasks):
        from lm_eval.models.huggingface import HFLM

        scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    rows: list[Row] = []
    runs: list[tuple[str, contextlib.AbstractContextManager[Any]]] = [(BASELINE, contextlib.nullcontext())]
    runs += zip(ablations, parts, strict=True)
    for number, (name, part) in enumerate(runs):
        progress("the whole model" if name == BASELINE else name, number, len(runs))
        with part, explained(tasks):
            found = lm_eval.simple_evaluate(
                scorer, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False, **options
            )
        rows += _score_rows(found["results"], name)
    base = {(row["task"], row["metric"]): row["value"] for row in rows if row["ablation"] == BASELINE}
    for row in rows:
        row["baseline"] = base[row["task"], row["metric"]]
        row["change"] = row["value"] - row["baseline"]
    return FRAMES["lm_eval"].frame(rows)


def _texts_of(
    tasks: Sequence[str], include_path: str | None, model: Any, tokenizer: Any
) -> list[dict[str, Any]]:
    """What the plain model reads for interventions that go by data: the first texts of each task, as the harness asks."""
    places = [f"{SCHEME}{task}:{include_path}" if include_path else f"{SCHEME}{task}" for task in tasks]
    texts = [text for place in places for text in islice(task_texts(place), TEXTS)]
    made = (
        tokenizer(text, return_tensors="pt", truncation=True, max_length=LENGTH)
        for text in texts
        if text.strip()
    )
    given = [{"input_ids": each["input_ids"].to(model.device)} for each in made]
    return [each for each in given if each["input_ids"].shape[1] > 1]


@torch.no_grad()
def refuse_encoders(model: Any) -> None:
    """RcProbeError for a model that gives no probabilities of next tokens from the tokens before.

    Seen on the model: logits of a whole vocabulary for each token, and, without an encoder, none that
    change with a later token.
    """
    config: Any = getattr(model, "config", None)
    vocabulary = getattr(config.get_text_config(), "vocab_size", 0) if config is not None else 0
    kind = type(model).__name__
    ids = torch.arange(8)[None].expand(2, 8) % max(vocabulary - 1, 1)
    ids = ids.clone()
    ids[1, -1] = vocabulary - 1  # a last token of its own
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    given = {"input_ids": ids.to(device)}
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = given["input_ids"]
    try:
        logits = getattr(model(**given), "logits", None)
    except Exception as error:
        raise RcProbeError(f"it takes no plain text ({first_line(error)})", where=kind) from error
    if logits is None or logits.ndim != 3 or logits.shape[-1] < vocabulary:
        raise RcProbeError(
            "it has no language-modelling head, and the harness scores next tokens", where=kind,
            todo="Give a checkpoint saved with its head (…ForCausalLM)",
        )  # fmt: skip
    moved = (logits[0, :-1] - logits[1, :-1]).abs().amax()  # by the last token, which differs
    noise = 4 * torch.finfo(logits.dtype).eps * logits.abs().amax()
    if "decoder_input_ids" not in given and not moved <= noise:
        raise RcProbeError(
            "its tokens see the tokens after them, so it is an encoder, and the harness scores next tokens",
            where=kind,
            todo="Use rc-probe with --label-column, or rc_probe.ablate around an evaluation of encoders (MTEB)",
        )


def _score_rows(results: dict[str, dict[str, Any]], ablation: str) -> Iterator[Row]:
    for task, scores in results.items():
        for key, value in scores.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = scores.get(f"{metric}_stderr,{kind}")
            yield {
                "task": task, "metric": metric if kind == "none" else key, "ablation": ablation,
                "value": float(value), "stderr": float(error) if isinstance(error, int | float) else math.nan,
            }  # fmt: skip
