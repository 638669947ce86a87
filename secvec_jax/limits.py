"""Limits on the time and the memory of code that came with a model, such as its chat template."""

import contextlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")

_TICK = 0.1
"""Seconds between two checks of the time and the memory."""
_OPERATION = 2**31
"""Bytes that a single operation may allocate."""
_PAGE = resource.getpagesize()


class LimitExceeded(Exception):
    """The code took more time or memory than it may."""


def run_limited(run: Callable[[], Result], seconds: float, memory: int) -> Result:
    """The result of Python code with limits on its wall time and on the bytes of memory by which the process may grow.

    A signal handler checks both every tenth of a second, between two operations of the interpreter. What a single
    operation allocates is limited by the operating system, on Linux: the process, with all its threads, may map
    `_OPERATION` bytes more meanwhile, but not within `unlimited_address_space`. There is no limit in threads other than
    the main one, where Python handles no signals.

    Raises LimitExceeded. The timer and the address space are then what they were before.
    """
    if threading.current_thread() is not threading.main_thread():
        return run()
    (mapped, before), start, is_running = _memory(), time.monotonic(), False

    def look(number: int, frame: FrameType | None) -> None:
        if is_running and time.monotonic() - start > seconds:
            raise LimitExceeded(f"it takes more than {seconds:g} seconds")
        if is_running and _memory().resident - before > memory:
            raise LimitExceeded(f"it takes more than {memory // 2**20:,} MiB of memory")

    space = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, look)
    timer = signal.setitimer(signal.ITIMER_REAL, _TICK, _TICK)
    try:
        if mapped is not None and not _allocating:
            _limit_address_space(mapped + _OPERATION)
        is_running = True
        return run()
    except MemoryError:
        raise LimitExceeded(f"it takes more than {_OPERATION // 2**20:,} MiB of memory at once") from None
    finally:
        # First: a look that raises in what follows would leave the rest undone. In a context manager it also could
        # raise on the way here, which is why this function takes one.
        is_running = False
        resource.setrlimit(resource.RLIMIT_AS, space)
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)


@contextlib.contextmanager
def unlimited_address_space() -> Iterator[None]:
    """Do not limit the address space in `run_limited` while this block runs, where other threads allocate.

    For blocks in which XLA computes while Python continues: an allocation of a step would fail at a limit that is meant
    for a template. Training reads only rows that were rendered once before it, with the limit.
    """
    global _allocating
    _allocating += 1
    try:
        yield
    finally:
        _allocating -= 1


_allocating = 0


def _limit_address_space(most: int) -> None:
    """Let the process map at most so many bytes, or fewer where there is a limit already."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    others = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(most, *others) if others else most, hard))


class _Memory(NamedTuple):
    """Bytes that the process has mapped, None where no limit on them is enforced; and bytes that it holds."""

    mapped: int | None
    resident: int


def _memory() -> _Memory:
    """The process's memory now. Each row of a data set is rendered with limits, so this must take microseconds."""
    if not sys.platform.startswith("linux"):
        unit = 1 if sys.platform == "darwin" else 1024
        return _Memory(None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)  # its peak, at least
    descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        mapped, resident, *_ = os.read(descriptor, 256).split()
    finally:
        os.close(descriptor)
    return _Memory(int(mapped) * _PAGE, int(resident) * _PAGE)
