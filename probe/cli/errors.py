"""Errors and interrupts as the command reports them: one line, and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from rc_probe.hooks.errors import RcProbeError, out_of_memory
from rc_probe.processes.launch import first_to_speak, launched

if TYPE_CHECKING:
    from rc_probe.processes.world import World


INTERRUPTED = 130  # the exit code after Ctrl-C, that of shells
PIPE_CLOSED = 141  # after `| head`


class Interrupted(KeyboardInterrupt):
    """Ctrl-C. A class of its own: Python ends by the signal itself after a bare KeyboardInterrupt in `exec`."""


@contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C raises Interrupted; yields a check that raises it when a library has swallowed the first one."""
    seen = []

    def note(number: int, frame: object) -> None:
        seen.append(number)
        raise Interrupted

    def check() -> None:
        if seen:
            raise Interrupted

    def ignored(event: Any) -> None:
        if event.exc_type is not Interrupted:  # swallowed in some __del__; `check` raises it again
            hook_before(event)

    before, hook_before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    sys.unraisablehook = ignored
    ours = threading.current_thread() is threading.main_thread()  # others cannot set handlers
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        sys.unraisablehook = hook_before
        if ours:
            signal.signal(signal.SIGINT, before)


@contextmanager
def one_line_errors(world: World | None = None) -> Iterator[None]:
    """What a user can run into ends the process with one line on standard error and exit code 2, Ctrl-C with 130.

    Of the processes of `world`, one on each machine says it.
    """
    try:
        yield
    except BrokenPipeError as error:
        raise _pipe_closed(error.__context__) from None
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # the parser, and what prints tables, end with 1
            raise _pipe_closed(None) from None
        raise
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and launched() is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # launchers hand it on, to those who know already
        line = _line(error)
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else 2
        if not (first_to_speak() if world is None else world.post(error)):
            raise SystemExit(code) from None
        if line is None:  # a fault of ours; Python's own exit code would be that of a failed check
            traceback.print_exc()
            raise SystemExit(2) from error
        fail(line, code)


def _pipe_closed(end: BaseException | None) -> SystemExit:
    """How a command ends whose reader has gone: quietly, with the exit code that it was about to end with where that was an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end
    return SystemExit((end.code if isinstance(end, SystemExit) else None) or PIPE_CLOSED)


def _line(error: BaseException) -> str | None:
    """What to say about an error; None about those that are no user's."""
    if isinstance(error, RcProbeError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted. Nothing was written; the same command starts anew"
    if out_of_memory(error):
        return "out of memory. Try a smaller --batch-size or --length, or --dtype bfloat16"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        return "the disk that standard output goes to is full"
    return usage(error)


def usage(error: BaseException) -> str | None:
    """What the parser did not understand, in one line with the nearest option; None for other errors."""
    if not hasattr(error, "format_message"):  # typer's own; what class they have changes with its version
        return None
    ctx = getattr(error, "ctx", None)
    name = ctx.command_path if ctx else "rc-probe"
    if (option := getattr(error, "option_name", None)) and hasattr(error, "possibilities"):
        shown = [each for each in (ctx.command.params if ctx else ()) if not getattr(each, "hidden", False)]
        flags = {flag.lstrip("-"): flag for each in shown for flag in (*each.opts, *each.secondary_opts)}
        near = get_close_matches(option.lstrip("-"), flags, n=1)
        todo = f"Did you mean {flags[near[0]]}?" if near else f"{name} --help lists all"
        return str(RcProbeError("no such option", where=option, todo=todo))
    return str(RcProbeError(error.format_message().rstrip("."), todo=f"See {name} --help"))


def fail(line: str, code: int = 2) -> NoReturn:
    """One line on standard error, and the exit code."""
    typer.echo(f"rc-probe: {' '.join(line.split())}", err=True)
    raise SystemExit(code)
