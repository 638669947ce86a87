"""SHA-256 of what goes into a result, and how two sets of inputs differ.

Inputs are a mapping from an input's label to its digest, or to a plain value:

    {"--data rows.jsonl": "sha256:...", "--model smollm2": "sha256:...", "format": 1}

None stands for a content that is not known, such as that of a file that is gone; it equals any other.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from secvec_jax.assets import cache_dir
from secvec_jax.errors import UserError
from secvec_jax.files import whole_file

_UNSETTLED = 2.0
"""Seconds after a change during which a file's digest is not cached: within one tick of the file system's clock, a
second change of the same size would not show in its times."""

_ATTEMPTS = 3
"""How often a file that changes while it is read is read again."""


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first input that is not what it was, in words; None if all are."""
    for label in {**before, **now}:
        old, new = before.get(label), now.get(label)
        if old is None or new is None or old == new:
            continue
        if any(isinstance(value, str) and value.startswith("sha256:") for value in (old, new)):
            return f"{label} has changed"
        return f"{label} was {old!r}, is now {new!r}"
    return None


def of_values(values: Iterable[Any]) -> str:
    """The digest of JSON values, in their order."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def of_file(path: str | os.PathLike) -> str:
    """The digest of a file's bytes, cached in the cache folder until the file's inode, size or times change.

    Raises OSError if it cannot be read, and UserError if it does not stop changing.
    """
    path = Path(path).resolve()
    entry = cache_dir() / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
    for _ in range(_ATTEMPTS):
        identity = _identity(path)
        known = _read(entry)
        if known is not None and known[0] == identity:
            return known[1]
        with path.open("rb") as stream:
            digest = f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
        if identity == _identity(path):
            _remember(entry, identity, digest)
            return digest
    raise UserError(f"{path} changes while it is read: wait until it is complete")


def of_files(folder: str | os.PathLike, paths: Iterable[Path]) -> str:
    """The digest of files under `folder`: of their relative names and their bytes."""
    folder = Path(folder)
    return of_values([str(path.relative_to(folder)), of_file(path)] for path in sorted(paths))


def _identity(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _read(entry: Path) -> tuple[list[int], str] | None:
    try:
        kept = json.loads(entry.read_text())
        return kept["identity"], str(kept["digest"])
    except (OSError, ValueError, KeyError, TypeError):  # absent, or damaged
        return None


def _remember(entry: Path, identity: list[int], digest: str) -> None:
    if time.time() - max(identity[-2:]) / 1e9 < _UNSETTLED:
        return
    with contextlib.suppress(OSError), whole_file(entry) as staging:  # a cache that cannot be written is no error
        staging.write_text(json.dumps({"identity": identity, "digest": digest}))
