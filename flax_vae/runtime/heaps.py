"""The heaps of malloc, from which a CPU's arrays below 32 MiB come.

glibc keeps what is freed in several heaps, in pieces that the next large array does not fit into: a stream that never
holds more than its first chunks did still grows by a tenth, and what compiling has freed stays for good.
"""

import ctypes
import functools
import sys
from collections.abc import Callable


def trim_heaps() -> None:
    """Returns the free pages of all heaps to the system; does nothing where the C library is not glibc."""
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int]:
    # On macOS and with musl there is no such function; on Windows there is no C library to look for it.
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, "malloc_trim", lambda _: 0)
