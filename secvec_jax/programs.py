"""The programs that JAX compiles: how long that takes, and when to drop them."""

import functools
import gc
import time
from pathlib import Path

import jax

_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
"""JAX's events for tracing, lowering, and compiling or reading from the compilation cache."""

_SHARE = 0.75
"""Share of the memory maps that Linux allows a process."""


def seconds_compiling() -> float:
    """Seconds that this process has traced, lowered and compiled programs since the first call."""
    return sum(end - start for start, end in _intervals())


@functools.cache
def _intervals() -> list[tuple[float, float]]:
    """When a program was made; programs that are traced within others are part of these."""
    intervals: list[tuple[float, float]] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in _EVENTS:
            end = time.monotonic()
            while intervals and intervals[-1][0] >= end - duration_secs:
                intervals.pop()
            intervals.append((end - duration_secs, end))

    jax.monitoring.register_event_duration_secs_listener(note)
    return intervals


def drop_programs_if_many() -> None:
    """Drop compiled programs when the process is near its limit of memory maps, of which each program takes some."""
    maps, limit = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    if maps.exists() and maps.read_bytes().count(b"\n") > int(limit.read_text()) * _SHARE:
        jax.clear_caches()
        gc.collect()
