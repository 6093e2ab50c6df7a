"""lm-evaluation-harness: accuracy without parts of a model, from the harness itself, and its tasks' texts as data."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

import torch

from rc_probe.hooks.errors import RcProbeError

from .contexts import ablate
from .run import Row
from .source import first_line, quiet
from .variants import parse_ablation

if TYPE_CHECKING:
    import pandas as pd

SCHEME = "lm-eval:"  # data of a task are named lm-eval:TASK, or lm-eval:TASK:DIR
BASELINE = "none"
INSTALL = "pip install 'rc-probe[lm-eval]'"
COLUMNS = ("task", "metric", "ablation", "value", "stderr", "baseline", "change")
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

    A row a number: task, metric (with its filter after a comma, but for the plain one), ablation ("none"
    first), value, stderr (NaN where the harness gives none), baseline and change. `limit` is of documents
    in each task; `include_path` a folder of task files of your own; `options` go to `lm_eval.simple_evaluate`.

    Raises RcProbeError for models that cannot be scored by their next tokens (encoders, models without a
    language-modelling head), tasks that are not there, and as `ablate` does.
    """
    import pandas as pd

    for text in ablations:
        parse_ablation(text)
    refuse_encoders(model)
    lm_eval = _library()
    parts = [ablate(model, name, stack=stack, blocks=blocks) for name in ablations]  # wrong ones are told now
    manager = task_manager(tasks, include_path)
    with _explained(tasks):
        from lm_eval.models.huggingface import HFLM

        scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    rows: list[Row] = []
    runs: list[tuple[str, contextlib.AbstractContextManager[Any]]] = [(BASELINE, contextlib.nullcontext())]
    runs += zip(ablations, parts, strict=True)
    for number, (name, part) in enumerate(runs):
        progress("the whole model" if name == BASELINE else name, number, len(runs))
        with part, _explained(tasks):
            found = lm_eval.simple_evaluate(
                scorer, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False, **options
            )
        rows += _score_rows(found["results"], name)
    frame = pd.DataFrame(rows, columns=list(COLUMNS[:5]))
    base = frame[frame["ablation"] == BASELINE].set_index(["task", "metric"])["value"]
    frame["baseline"] = [
        base[task, metric] for task, metric in zip(frame["task"], frame["metric"], strict=True)
    ]
    frame["change"] = frame["value"] - frame["baseline"]
    return frame


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
        with torch.no_grad():
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


def task_texts(spec: str) -> Iterator[str]:
    """The texts of `lm-eval:TASK[:DIR]`, one a document, as the harness asks: the question, else the whole text.

    Documents come in the order of the task; few-shot examples are part of the question where the task
    has them.
    """
    name, _, folder = spec.removeprefix(SCHEME).partition(":")
    _library()
    manager = task_manager([name], folder or None)
    with _explained([name]):
        tasks = manager.load([name])["tasks"].values()
    for task in tasks:
        told = 0
        for limit in (64, 1024, None):  # the harness makes requests all at once, and mostly few are wanted
            with _explained([name]):
                task.build_all_requests(limit=limit)
            first = {instance.doc_id: instance for instance in reversed(task.instances)}
            yield from (_text(first[index].args) for index in sorted(first)[told:])
            if limit is None or len(first) < limit:
                break
            told = len(first)


def _text(arguments: tuple[Any, ...]) -> str:
    texts = [part for part in arguments if isinstance(part, str)]
    return next((text for text in texts if text.strip()), "")


def task_manager(tasks: Sequence[str], include_path: str | None = None) -> Any:
    """The harness's index of tasks: of the folder `include_path` if all are there, else its own, too.

    Its own are thousands of files, and reading them takes some ten seconds.
    """
    if include_path is not None and not os.path.isdir(include_path):
        raise RcProbeError("no such folder", where=f"--include-path {include_path}", todo="Check the path")
    with quiet():
        from lm_eval.tasks import TaskManager

        if include_path is not None:
            mine = TaskManager(include_path=include_path, include_defaults=False)
            if set(tasks) <= set(mine.all_tasks):
                return mine
        return TaskManager(include_path=include_path)


def _library() -> Any:
    try:
        with quiet():
            import lm_eval
    except ImportError:
        raise RcProbeError("lm_eval is not installed", where="lm-eval", todo=INSTALL) from None
    return lm_eval


@contextlib.contextmanager
def _explained(tasks: Sequence[str]) -> Iterator[None]:
    """The harness's own errors as one line; no reports or bars of it."""
    try:
        with quiet(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), _muted(nowhere):
            yield
    except RcProbeError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and "out of memory" in str(error):
            raise
        where = f"--tasks {','.join(tasks)}"
        raise RcProbeError(
            f"the harness fails ({type(error).__name__}: {first_line(error)})", where=where,
            todo="Check the names (lm_eval ls tasks), --include-path, and that the task's data are at hand",
        ) from error  # fmt: skip


@contextlib.contextmanager
def _muted(nowhere: IO[str]) -> Iterator[None]:
    """Standard error of programs that are started inside (the harness asks git for a version) goes `nowhere`."""
    before = os.dup(2)
    os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


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
