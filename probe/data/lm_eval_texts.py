"""The texts of lm-evaluation-harness' tasks, as data: `lm-eval:TASK`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from rc_probe.hooks.errors import RcProbeError
from rc_probe.models.libraries import first_line, quiet

if TYPE_CHECKING:
    pass

SCHEME = "lm-eval:"  # data of a task are named lm-eval:TASK, or lm-eval:TASK:DIR
INSTALL = "pip install 'rc-probe[lm-eval]'"


def task_texts(spec: str) -> Iterator[str]:
    """The texts of `lm-eval:TASK[:DIR]`, one a document, as the harness asks: the question, else the whole text.

    Documents come in the order of the task; few-shot examples are part of the question where the task
    has them.
    """
    name, _, folder = spec.removeprefix(SCHEME).partition(":")
    library()
    manager = task_manager([name], folder or None)
    with explained([name]):
        tasks = manager.load([name])["tasks"].values()
    for task in tasks:
        told = 0
        for limit in (64, 1024, None):  # the harness makes requests all at once, and mostly few are wanted
            with explained([name]):
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


def library() -> Any:
    try:
        with quiet():
            import lm_eval
    except ImportError:
        raise RcProbeError("lm_eval is not installed", where="lm-eval", todo=INSTALL) from None
    return lm_eval


@contextlib.contextmanager
def explained(tasks: Sequence[str]) -> Iterator[None]:
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
