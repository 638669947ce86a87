"""Files and folders that are either whole or absent, and folders that one process at a time works in."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secvec_jax.errors import UserError


@contextlib.contextmanager
def whole_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A temporary sibling of `target` to write into, which takes its place when the block ends well.

    After an error (a full disk, Ctrl-C) whatever stood at `target` still stands there, and nothing else.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield staging
        os.chmod(staging, 0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.rename(target, old / "it")
            try:
                os.rename(staging, target)
            except BaseException:
                os.rename(old / "it", target)
                os.rmdir(old)
                raise
            shutil.rmtree(old)
        else:
            os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def whole_file(target: str | os.PathLike) -> Iterator[Path]:
    """A temporary sibling of `target` to write, which takes its place when the block ends well."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, staging = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        yield Path(staging)
        os.chmod(staging, 0o644)
        os.replace(staging, target)
    finally:
        Path(staging).unlink(missing_ok=True)


def check_replaceable(target: Path, mark: str | None = None) -> None:
    """Raises UserError if writing to `target` would replace something of another kind.

    mark: a file that folders of the kind to be written have; None: `target` is to be a file.
    """
    if mark is None:
        if target.is_dir():
            raise UserError(f"{target} is a folder: name a file to write")
        return
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: name a folder to write into")
    if target.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{target} is the current folder or one above it: name a folder inside it")
    if target.is_dir() and not (target / mark).exists() and any(target.iterdir()):
        raise UserError(f"{target} holds other files, which would be replaced: name a new or an empty folder")


def lock(folder: str | os.PathLike) -> Any:
    """A held lock on `folder`, to be released by `.release()`; the kernel releases it when the process ends, however.

    Locks of one process on one folder do not exclude each other. Raises UserError if another process holds it, and
    OSError if the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / LOCK, timeout=0, is_singleton=True, thread_local=False)
    try:
        held.acquire()
    except Timeout:
        raise UserError(f"another process is running in {folder}: wait until it ends, or give another folder") from None
    return held


LOCK = "run.lock"
"""The file in a folder that its lock is on. It stays: two processes must find the same file."""
