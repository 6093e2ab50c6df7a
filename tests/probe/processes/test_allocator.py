"""The command's process keeps what it freed; others, and those whose user has set the allocator, are left alone."""

import os
import subprocess
import sys

import pytest

KEEPS = """
import resource, sys
from rc_probe.processes.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del [bytearray(2**20) for _ in range(100)][:]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(kept, faults())
"""
glibc = pytest.mark.skipif(
    "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}), reason="needs glibc"
)


def run(how: str, **env: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", KEEPS, how], env=os.environ | env, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@glibc
def test_memory_that_was_freed_is_found_again() -> None:
    """100 MiB, which are 25,600 pages, taken for the second time."""
    assert run("leave")[1] > 20_000
    kept, faults = run("keep")
    assert kept == "True"
    assert faults < 100


@glibc
def test_what_the_user_has_set_stays() -> None:
    kept, faults = run("keep", MALLOC_TRIM_THRESHOLD_="1000")
    assert kept == "False"
    assert faults > 20_000


def test_without_glibc_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    from rc_probe.processes.allocator import keep_freed_memory

    monkeypatch.setattr(os, "confstr_names", {})
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("the C library was asked"))
    assert not keep_freed_memory()
