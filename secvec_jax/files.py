"""Files and folders that are either whole or absent."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


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
