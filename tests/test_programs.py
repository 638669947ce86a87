"""The time that compiling takes, and programs that are dropped."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp

from secvec_jax import programs
from secvec_jax.programs import drop_programs_if_many, seconds_compiling
from tests.processes import call_in_a_process


def test_only_compiling_counts_and_programs_within_others_count_once():
    @jax.jit
    def inner(x):
        time.sleep(0.3)  # while it is traced
        return jnp.sin(x)

    @jax.jit
    def outer(x):
        return inner(inner(x) + 1.0)

    x = jnp.ones(())
    before, start = seconds_compiling(), time.monotonic()
    outer(x).block_until_ready()
    first = seconds_compiling() - before
    assert 0.3 <= first <= time.monotonic() - start
    for _ in range(3):
        outer(x).block_until_ready()
    time.sleep(0.1)
    assert seconds_compiling() - before == first


def test_programs_are_dropped_when_there_are_too_many_and_only_then():
    """In a process of its own, which holds few others."""
    call_in_a_process(check_dropping)


def check_dropping() -> None:
    traced = []

    @jax.jit
    def double(x):
        traced.append(x)
        return 2 * x

    double(1.0)
    drop_programs_if_many()
    double(1.0)
    assert len(traced) == 1
    if Path("/proc/self/maps").exists():
        programs._SHARE = 0.0
        drop_programs_if_many()
        double(1.0)
        assert len(traced) == 2
