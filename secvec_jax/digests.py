"""Content digests (SHA-256) of a run's inputs, and a comparison of two sets of inputs.

Inputs map a label to a digest or to a plain value:

    {"--data rows.jsonl": "sha256:...", "--model smollm2": "sha256:...", "format": 1}

None means unknown content, such as that of a deleted file; it compares equal to anything.
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
from secvec_jax.files import atomic_file, read_kept, resolved

_UNSETTLED = 2.0
"""Seconds after a modification during which a file's digest is not cached: a second change of the same size, within one
tick of the file system's clock, would leave the timestamps unchanged."""

_ATTEMPTS = 3
"""How many times a file is read if it changes while being read."""


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Describe the first input that differs, or return None if none does."""
    for label in {**before, **now}:
        old, new = before.get(label), now.get(label)
        if old is None or new is None or old == new:
            continue
        if any(isinstance(value, str) and value.startswith("sha256:") for value in (old, new)):
            return f"{label} has changed"
        return f"{label} was {old!r}, is now {new!r}"
    return None


def of_values(values: Iterable[Any]) -> str:
    """Return the digest of a sequence of JSON values."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def of_file(path: str | os.PathLike) -> str:
    """Return the digest of a file's bytes, cached on disk until the file's inode, size or timestamps change.

    Raises OSError if the file cannot be read, and UserError if it keeps changing while it is read.
    """
    path = resolved(path)
    entry = _entry(path)
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
    raise UserError(f"{path} keeps changing while it is read: wait until it is complete")


def of_files(folder: str | os.PathLike, paths: Iterable[Path]) -> str:
    """Return the digest of files under `folder`, over their relative paths and their bytes."""
    folder = Path(folder)
    return of_values([str(path.relative_to(folder)), of_file(path)] for path in sorted(paths))


def _identity(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _entry(path: Path) -> Path | None:
    """Where the digest of a file is cached; None if there is no cache."""
    try:
        return cache_dir() / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
    except UserError:
        return None


def _read(entry: Path | None) -> tuple[list[int], str] | None:
    if entry is None or not os.path.exists(entry):
        return None
    try:
        cached = read_kept(entry, "it is made again")
        return cached["identity"], str(cached["digest"])
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
        return None


def _remember(entry: Path | None, identity: list[int], digest: str) -> None:
    if entry is None or time.time() - max(identity[-2:]) / 1e9 < _UNSETTLED:
        return
    with contextlib.suppress(OSError), atomic_file(entry) as staging:  # a read-only cache is not an error
        staging.write_text(json.dumps({"identity": identity, "digest": digest}))
