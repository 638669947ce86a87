"""Checks of files before they are opened, atomic writes of files and folders, and locks on folders."""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secvec_jax.errors import UserError


def expanded(path: str | os.PathLike) -> Path:
    """The path with ~ replaced by the home folder. Raises UserError if it has none, as for `~somebody`."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} names a home folder that does not exist: write the whole path") from error


def check_regular(path: str | os.PathLike, max_bytes: int | None = None) -> None:
    """Raise UserError if anything but a regular file is at `path`, or one of more than `max_bytes`.

    Opening a FIFO would block, and reading a device would never end. A path where nothing is passes: whoever opens it
    knows what is missing.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise UserError(f"{path} is a link to a file that does not exist: copy the file itself") from error
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for is_kind, kind in _OTHER_KINDS if is_kind(status.st_mode)), "not a regular file")
        raise UserError(f"{path} is {kind}, where a file has to be: give a regular file")
    if max_bytes is not None and status.st_size > max_bytes:
        raise UserError(f"{path} has {status.st_size:,} bytes, more than the {max_bytes:,} that such a file may have")


_OTHER_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def check_entries(folder: str | os.PathLike) -> None:
    """Raise UserError if an entry of `folder` is neither a folder nor a regular file, for libraries that open them."""
    try:
        entries = sorted(Path(folder).iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror or error}): check its permissions") from error
    for entry in entries:
        if not entry.is_dir():
            check_regular(entry)


@contextlib.contextmanager
def whole_folder(target: str | os.PathLike, mode: int = 0o755) -> Iterator[Path]:
    """Yield a temporary folder next to `target` that replaces it when the block succeeds.

    mode: the permissions of the folder. After an error (a full disk, Ctrl-C) `target` is unchanged, and the temporary
    folder is deleted.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield staging
        os.chmod(staging, mode)
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
def whole_file(target: str | os.PathLike, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary file next to `target` that replaces it when the block succeeds. mode: its permissions."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, staging = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        yield Path(staging)
        os.chmod(staging, mode)
        os.replace(staging, target)
    finally:
        Path(staging).unlink(missing_ok=True)


def check_replaceable(target: Path, mark: str | None = None) -> None:
    """Raise UserError if writing `target` would replace something of a different kind.

    mark: the name of a file that every folder of this kind contains; None if `target` is to be a file.
    """
    if mark is None:
        if target.is_dir():
            raise UserError(f"{target} is a folder: name a file to write")
        return
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: name a folder to write into")
    if target.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{target} is the current folder or one of its parents: name a folder inside it")
    if target.is_dir() and not (target / mark).exists() and any(target.iterdir()):
        raise UserError(f"{target} contains other files, which would be replaced: name a new or an empty folder")


def lock(folder: str | os.PathLike) -> Any:
    """Acquire and return a lock on `folder`; call `.release()` to release it.

    The kernel releases it when the process ends for any reason. Within one process, locks on the same folder do not
    exclude each other. Raises UserError if another process holds the lock, and OSError if the folder is not writable.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / LOCK, timeout=0, is_singleton=True, thread_local=False)
    try:
        held.acquire()
    except Timeout:
        raise UserError(f"another process is using {folder}: wait for it to finish, or use another folder") from None
    return held


LOCK = "run.lock"
"""The lock file in a folder. It is never deleted, since all processes must lock the same file."""
