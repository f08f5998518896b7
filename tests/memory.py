"""For both suites: how much memory tests take, together and in the long run."""

import ctypes
import gc
import os
import sys
from pathlib import Path

import filelock
import pytest

MAX_RESIDENT = 3 * 2**29  # bytes of a process, above which it forgets what it has compiled


@pytest.fixture(autouse=True)
def alone(request, tmp_path_factory):
    """Waits, before a test that is marked as large, until no other process of this run is at one."""
    if request.node.get_closest_marker("large") is None:
        yield
        return
    with filelock.FileLock(tmp_path_factory.getbasetemp().parent / "large.lock"):
        yield


@pytest.fixture(autouse=True)
def bounded():
    """Drops compiled programs after a test that leaves the process large: jax keeps every one, and they add up."""
    yield
    if sys.platform == "linux" and resident() > MAX_RESIDENT:
        import jax

        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Returns the bytes of memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
