"""Small work on the CPU is done by one thread: more threads gain nothing there, and cost many times its CPU time.

A pass over a few MiB takes about 50 µs, and LAPACK meets its threads hundreds of times in a small matrix. On a busy machine each
meeting waits until the last thread gets its turn. Measured on two threads: 20 times the CPU time of one for metrics of a small
stream, 10 times for the eigenvalues of a matrix of 128 rows where threads sleep in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from .undo import undoing

MATRIX = 256  # rows and columns up to which LAPACK takes as long on one thread as on two


@contextmanager
def one_thread(small: bool) -> Iterator[None]:
    """One CPU thread while it is open, where the work is small; then as many as before.

    The number is the process's: a thread of Python whose very first operation falls inside keeps one.
    """
    threads = torch.get_num_threads()
    if not small or threads == 1:
        yield
        return
    with undoing(partial(torch.set_num_threads, threads)):
        torch.set_num_threads(1)
        yield


@contextmanager
def small_matrices(matrices: Tensor) -> Iterator[None]:
    """One CPU thread for the linear algebra of `matrices` (..., n, m), where they are of at most MATRIX rows and columns."""
    with one_thread(matrices.device.type == "cpu" and max(matrices.shape[-2:]) <= MATRIX):
        yield
