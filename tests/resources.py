"""For both suites: the processors that a process takes, how it compiles programs and which it keeps, its memory."""

import contextlib
import ctypes
import gc
import os
import sys
from pathlib import Path

import filelock
import pytest

MAX_RESIDENT = 2**31  # bytes of a process, above which it forgets what it has compiled
COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "d" / "compiled"  # where pytest.Cache.mkdir puts it


def share() -> None:
    """Divides the processors among the processes of pytest-xdist, and has all keep compiled programs for each other.

    Called before jax is imported. Threads that wait for work keep a processor busy, which would be another process's.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))  # in bytes; with a limit, access is locked
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
        processors = sorted(os.sched_getaffinity(0))
        index, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        os.sched_setaffinity(0, processors[index::count] or processors)


@contextlib.contextmanager
def compiled_fast():
    """Has programs compiled in half the time, to slower code; those of processes that are started meanwhile too."""
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "1")
        jax.config.update(name, True)
        try:
            yield
        finally:  # where a test in a `with` of its own fails, too
            jax.config.update(name, before)


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
