"""Limits on the time and the memory of code that came with a model, such as its chat template."""

import contextlib
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

_TICK = 0.1
"""Seconds between two looks at the time and the memory."""


class LimitExceeded(Exception):
    """The code took more time or memory than it may."""


@contextlib.contextmanager
def limited(seconds: float, memory: int) -> Iterator[None]:
    """Raise LimitExceeded in a block of Python code that takes more wall time or more bytes of memory than this.

    A signal looks at both every tenth of a second. It cannot end a single operation of the interpreter (one on a text
    or a number of gigabytes), and there is no limit in threads other than the main one, where Python handles no
    signals. memory: by which the process's peak may grow.
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
        yield
    finally:
        is_running = False
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)


def _peak_memory() -> int:
    """The most bytes of memory that the process has had at once."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
