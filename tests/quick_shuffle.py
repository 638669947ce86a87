"""Keeps grain's shuffles, on import: in memory, and in a file between runs.

Grain finds the place of a row by walking a cipher over 65,536 numbers until it meets one that is a row's: ten
milliseconds a row where there are three, most of the time of a short training. The function is pure, so that the order
is the same.
"""

import contextlib
import getpass
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

from grain._src.python.dataset.transformations import shuffle

_FILE = Path(tempfile.gettempdir()) / f"secvec_jax_shuffles_{getpass.getuser()}.json"
_compute = shuffle.index_shuffle.index_shuffle


def _read() -> dict[str, int]:
    """What earlier runs have kept."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(_FILE.read_text())
    return {}


_known = _read()
_number_read = len(_known)


def _index_shuffle(index: int, max_index: int, seed: int, rounds: int) -> int:
    key = f"{index} {max_index} {seed} {rounds}"
    if key not in _known:
        _known[key] = _compute(index, max_index=max_index, seed=seed, rounds=rounds)
    return _known[key]


def keep() -> None:
    """Write what is known for later runs, together with what other workers have written."""
    if len(_known) > _number_read:
        staging = _FILE.with_suffix(f".{os.getpid()}")
        staging.write_text(json.dumps(_read() | _known))
        staging.replace(_FILE)


shuffle.index_shuffle = SimpleNamespace(index_shuffle=_index_shuffle)
