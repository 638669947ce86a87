"""Limits on the time and the memory of code that came with a model, such as its chat template."""

import contextlib
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_TICK = 0.1
"""Seconds between two looks at the time and the memory."""
_OPERATION = 2**31
"""Bytes that a single operation may allocate."""


class LimitExceeded(Exception):
    """The code took more time or memory than it may."""


@contextlib.contextmanager
def limited(seconds: float, memory: int) -> Iterator[None]:
    """Raise LimitExceeded in a block of Python code that takes more wall time or more bytes of memory than this.

    A signal looks at both every tenth of a second, between two operations of the interpreter. What a single operation
    allocates is limited by the operating system, on Linux: the process, with all its threads, may map `_OPERATION`
    bytes more while the block runs, but not within `unlimited_address_space`. There is no limit in threads other than
    the main one, where Python handles no signals. memory: by which the process's peak may grow.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    start, peak, is_running = time.monotonic(), _peak_memory(), True

    def look(number: int, frame: FrameType | None) -> None:
        if is_running and time.monotonic() - start > seconds:
            raise LimitExceeded(f"it takes more than {seconds:g} seconds")
        if is_running and _peak_memory() - peak > memory:
            raise LimitExceeded(f"it takes more than {memory // 2**20:,} MiB of memory")

    handler = signal.signal(signal.SIGALRM, look)
    timer = signal.setitimer(signal.ITIMER_REAL, _TICK, _TICK)
    try:
        with _address_space(_OPERATION):
            yield
    except MemoryError:
        raise LimitExceeded(f"it takes more than {_OPERATION // 2**20:,} MiB of memory at once") from None
    finally:
        is_running = False
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)


@contextlib.contextmanager
def unlimited_address_space() -> Iterator[None]:
    """Do not limit the address space within `limited` while this block runs, where other threads allocate.

    For blocks in which XLA computes while Python goes on: an allocation of a step would fail at a limit that is meant
    for a template. Training reads only rows that were rendered once before it, with the limit.
    """
    global _allocating
    _allocating += 1
    try:
        yield
    finally:
        _allocating -= 1


_allocating = 0


@contextlib.contextmanager
def _address_space(more: int) -> Iterator[None]:
    """Let the process map at most so many bytes more. Only Linux enforces that; elsewhere this does nothing."""
    if _allocating or not sys.platform.startswith("linux"):
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + more
    others = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(most, *others) if others else most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _peak_memory() -> int:
    """The most bytes of memory that the process has had at once."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
