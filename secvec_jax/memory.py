"""Return freed memory of the host to the operating system."""

import ctypes
import functools
from collections.abc import Callable


def return_freed_memory() -> None:
    """Return freed memory to the operating system, with a C library that keeps it (glibc).

    It keeps gigabytes that training on a CPU frees, and the next stage's memory would come on top.
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
