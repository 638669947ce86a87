"""Memory of the host that a run has freed."""

import ctypes
import functools
from collections.abc import Callable


def return_freed_memory() -> None:
    """Give memory that was freed back to the operating system, where the C library is one that keeps it (glibc).

    It keeps what training on a CPU frees in parts, gigabytes, and the next stage's memory comes on top.
    """
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return lambda pad: None
    trim.argtypes = [ctypes.c_size_t]
    return trim
