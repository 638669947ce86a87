"""Freed memory goes back to the system."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from secvec_jax.memory import return_freed_memory

STATUS = Path("/proc/self/status")


def resident() -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(
    not (STATUS.exists() and hasattr(ctypes.CDLL(None), "malloc_trim")), reason="only glibc keeps what is freed"
)
def test_what_the_c_library_keeps_of_freed_arrays_is_given_back():
    before = resident()
    arrays = [np.ones(200_000, np.float32) for _ in range(500)]
    kept = arrays[::50]  # else the library gives the end of its heap back by itself
    size = sum(array.nbytes for array in arrays)
    assert resident() - before > 0.9 * size
    del arrays
    return_freed_memory()
    assert resident() - before < 0.3 * size and len(kept) == 10
