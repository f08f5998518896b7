"""Memory that is used again: what a program frees stays with the process, ready for its next run."""

from __future__ import annotations

import ctypes
import sys

MMAP_MAX, TRIM_THRESHOLD, ARENA_MAX = -4, -1, -8  # options of mallopt, in glibc's malloc.h


def keep_freed_memory() -> None:
    """Has malloc keep what is freed, and all threads share it; with a libc other than glibc nothing changes.

    XLA's CPU backend frees its scratch memory after every run. glibc gives so large a block back to the system, which
    clears each page of the next one: a tenth of the time of encoding. The process then stays as large as it was at
    its peak. Call it first of all: blocks of threads that are there already are not touched.
    """
    if not sys.platform.startswith("linux") or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return
    for option, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (ARENA_MAX, 1)):
        libc.mallopt(option, value)
