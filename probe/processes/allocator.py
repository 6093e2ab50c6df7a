"""How the C library keeps memory that was freed: that of a process of our own, so that passes on the CPU find it again."""

import ctypes
import os

TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)
KEPT = 2**28  # bytes at the end of the heap that are not given back
LARGE = 2**25  # bytes from which on a tensor has pages of its own; glibc allows no more


def keep_freed_memory() -> bool:
    """Let this process keep up to 256 MiB that it has freed; whether that was possible: with glibc, where the user set nothing.

    glibc gives freed memory back whenever the end of its heap is free, and takes it again, page by page, for the next large tensor.
    In passes on the CPU whose streams are measured between blocks that happens at each block: up to a quarter of their time.
    For processes of our own alone: what glibc does by itself cannot be had back.

    Source: mallopt(3).
    """
    theirs = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if theirs or "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(MMAP, LARGE)) and bool(mallopt(TRIM, KEPT))
