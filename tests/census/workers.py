"""A task for each model type, each in a process of its own: a crash or a hang of one touches no other.

The parent has imported what the task needs; a child is a fork of it, so it starts at once, and has one thread.
"""

from __future__ import annotations

import multiprocessing as mp
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

Task = Callable[[str], Any]


class _Child(NamedTuple):
    process: Any
    pipe: Connection
    deadline: float


def run(
    types: Iterable[str], task: Task, *, processes: int = 2, seconds: float = 60
) -> Iterator[tuple[str, Any]]:
    """(type, `task(type)`) for each type, in the order in which they end.

    processes: at once; seconds: for each, after which it is killed. The result must pickle. Where a task raises,
    crashes, exits or takes too long, a `Failed` with the reason stands for its result.
    """
    waiting = list(types)[::-1]
    children: dict[str, _Child] = {}
    try:
        while waiting or children:
            while waiting and len(children) < processes:
                model_type = waiting.pop()
                children[model_type] = _start(task, model_type, seconds)
            yield from _ended(children, seconds)
    finally:
        for child in children.values():
            _stop(child)


class Failed(str):
    """Why a task has no result, in one line."""

    __slots__ = ()


def _start(task: Task, model_type: str, seconds: float) -> _Child:
    context = mp.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(task, model_type, sender), daemon=True)
    process.start()
    sender.close()  # only the child holds it, so its death ends the pipe
    return _Child(process, receiver, time.monotonic() + seconds)


def _work(task: Task, model_type: str, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        result = task(model_type)
    except BaseException as error:
        result = Failed(f"{type(error).__name__}: {' '.join(str(error).split())}")
    try:
        pipe.send(result)
    except Exception as error:
        pipe.send(Failed(f"result cannot be sent: {type(error).__name__}: {error}"))
    pipe.close()


def _ended(children: dict[str, _Child], seconds: float) -> Iterator[tuple[str, Any]]:
    """The results of the children that end next; at least one, or none where a deadline comes first."""
    now = time.monotonic()
    patience = max(0.0, min(child.deadline for child in children.values()) - now)
    ready = wait([child.pipe for child in children.values()], timeout=patience)
    for model_type, child in list(children.items()):
        if child.pipe in ready:
            result = _receive(child)
        elif time.monotonic() >= child.deadline:
            result = Failed(f"took more than {seconds:g} s")
        else:
            continue
        _stop(children.pop(model_type))
        yield model_type, result


def _receive(child: _Child) -> Any:
    try:
        return child.pipe.recv()
    except EOFError:
        child.process.join(5)
        code = child.process.exitcode
        return Failed(f"killed by signal {-code}" if code and code < 0 else f"exited with code {code}")
    except Exception as error:
        return Failed(f"result cannot be read: {type(error).__name__}: {error}")


def _stop(child: _Child) -> None:
    child.process.join(0.2)
    if child.process.is_alive():
        child.process.kill()
        child.process.join()
    child.pipe.close()
