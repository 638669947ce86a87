"""Checks of files before they are opened, atomic writes of files and folders, and locks on folders.

Unfinished files have a hidden name next to their target, such as `.model.unfinished-k3x9a_2q`, and are locked while
their process lives: unlocked ones were left by killed processes.
"""

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from secvec_jax.errors import UserError, WriteError


def expanded(path: str | os.PathLike) -> Path:
    """The path with ~ replaced by the home folder. Raises UserError if it has none, as for `~somebody`."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} names a home folder that does not exist: write the whole path") from error


def check_regular(path: str | os.PathLike, max_bytes: int | None = None) -> None:
    """Raise UserError if anything but a regular file is at `path`, or one of more than `max_bytes`.

    Opening a FIFO would block, and reading a device would never end. A missing file passes: the code that opens it
    reports it.
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
        raise UserError(f"{path} is {kind}, but must be a file: give a regular file")
    if max_bytes is not None and status.st_size > max_bytes:
        raise UserError(f"{path} has {status.st_size:,} bytes, more than the {max_bytes:,} that such a file may have")


_OTHER_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def check_no_url(path: str | os.PathLike) -> None:
    """Raise UserError if a path that is to be written is a URL of an object store."""
    if match := _URL.match(os.fspath(path)):
        raise UserError(
            f"{match[1]}:// has no locks and no renames, which runs and checkpoints need: give a folder of a file "
            "system, and copy the result with eval.py export, whose --out can be a URL"
        )


_URL = re.compile(r"([a-z][a-z0-9+.-]+):/")
"""A URL, or `Path` of one."""


def resolved(path: str | os.PathLike) -> Path:
    """The path without links and `..`. Raises UserError for circular links and invalid paths."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is not a path that can be read or written ({error})") from error


def read_kept(path: Path, fix: str) -> Any:
    """The JSON in a file of a run. Raises UserError, which ends with `fix`, if it cannot be read."""
    check_regular(path, max_bytes=_KEPT_BYTES)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {fix}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {fix}") from error


_KEPT_BYTES = 2**30


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records in a file of JSON lines, without damaged lines; empty if there is no file."""
    if not path.exists():
        return []
    check_regular(path)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error
    records = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


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
def atomic_folder(target: str | os.PathLike, mode: int = 0o755) -> Iterator[Path]:
    """Yield a temporary folder next to `target` that replaces it when the block succeeds.

    mode: the permissions of the folder. After an error (a full disk, Ctrl-C) `target` is unchanged, and the temporary
    folder is deleted, as are those that killed processes have left. Raises WriteError if the system cannot write, and
    UserError if `target` is not a folder.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: name a folder to write into")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_unfinished(target.parent, target.name)
        with _temporary_folder(target, _UNFINISHED) as staging:
            yield staging
            os.chmod(staging, mode)
            if not target.exists():
                os.rename(staging, target)
                return
            with _temporary_folder(target, _OLD) as old:
                os.rename(target, old / _REPLACED)
                try:
                    os.rename(staging, target)
                except BaseException:
                    os.rename(old / _REPLACED, target)
                    raise


@contextlib.contextmanager
def atomic_file(target: str | os.PathLike, mode: int = 0o644, *, clears: bool = True) -> Iterator[Path]:
    """Yield a temporary file next to `target` that replaces it when the block succeeds.

    mode: its permissions. clears: first delete what killed processes have left of this target, which reads the names
    of all files in its folder. Raises WriteError if the system cannot write, and UserError if anything but a regular
    file is at `target`: replacing a device such as /dev/null would remove it.
    """
    target = Path(target)
    with writing(target):
        if target.exists():
            check_regular(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if clears:
            clear_unfinished(target.parent, target.name)
        staging, handle = _temporary(target, _UNFINISHED, _new_file)
        try:
            yield staging
            os.chmod(staging, mode)
            os.replace(staging, target)
        finally:
            os.close(handle)
            staging.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder next to `target`, on its file system, and delete it in the end.

    Those that killed processes have left are deleted first. Raises OSError if the system cannot write.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_unfinished(target.parent, target.name)
    with _temporary_folder(target, _UNFINISHED) as folder:
        yield folder


def append_line(path: Path, line: str) -> None:
    """Append a line to a file; an error leaves the file as it was. Raises WriteError if the system cannot write."""
    with writing(path), path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        remaining = memoryview(line.encode() + b"\n")
        try:
            while remaining:
                remaining = remaining[file.write(remaining) :]  # a disk that fills up takes a part
        except OSError:
            file.truncate(size)
            raise


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Raise WriteError, which names the target and the cause, for the system's errors inside the block.

    Raises UserError for a URL, which as a path would be a local folder of that name.
    """
    check_no_url(target)
    try:
        yield
    except Exception as error:
        cause = system_error(error)
        if cause is None or isinstance(error, UserError):
            raise
        fix = f": {_FIX}" if cause in _FULL else ""
        raise WriteError(f"cannot write {target} ({cause}){fix}") from error


def system_error(error: BaseException) -> str | None:
    """The system's words for an error, such as "No space left on device"; None for an error of another kind.

    A full disk is also recognized by the messages of libraries with their own exceptions, and by an error's causes.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    cause: BaseException | None = error
    while cause is not None:
        for words in _FULL:
            if words in str(cause):
                return words
        cause = cause.__cause__ or cause.__context__
    return None


_FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
_FIX = "free some space and rerun the same command; what was written before is kept"

_UNFINISHED, _OLD, _REPLACED = "unfinished-", "replaced-", "it"
_LEFTOVER = re.compile(rf"\.(?P<name>.+)\.(?P<kind>{_UNFINISHED}|{_OLD})[a-z0-9_]{{8}}")


def is_unfinished(name: str) -> bool:
    """Whether a file or folder of this name is one that was being written."""
    return _LEFTOVER.fullmatch(name) is not None


def clear_unfinished(folder: Path, name: str | None = None, within: Iterable[str] = ()) -> None:
    """Delete what killed processes left unfinished in a folder: of one target, or of all.

    within: patterns of its subfolders, in all of which the same is done, whatever the target.

    A folder that was being replaced, and whose successor had not taken its place, is put back.
    """
    candidates = list(folder.glob(f".{glob.escape(name)}.*" if name is not None else ".*"))
    for path in candidates + [path for pattern in within for part in folder.glob(pattern) for path in part.rglob(".*")]:
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or (name is not None and match["name"] != name):
            continue
        with contextlib.suppress(OSError), _only_lock(path) as is_leftover:
            if not is_leftover:
                continue
            target = path.with_name(match["name"])
            if match["kind"] == _OLD and (path / _REPLACED).exists() and not target.exists():
                os.rename(path / _REPLACED, target)
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _temporary_folder(target: Path, kind: str) -> Iterator[Path]:
    """A locked folder next to the target, deleted in the end if it is still there."""
    folder, handle = _temporary(target, kind, tempfile.mkdtemp)
    try:
        yield folder
    finally:
        os.close(handle)
        if kind != _OLD or target.exists():  # else it is the only copy
            shutil.rmtree(folder, ignore_errors=True)


def _temporary(target: Path, kind: str, make: Callable[..., str]) -> tuple[Path, int]:
    """A new file or folder next to the target, and a handle that holds its lock."""
    while True:
        path = Path(make(prefix=f".{target.name}.{kind}", dir=target.parent))
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # another process deleted it as a leftover before it was locked
            continue
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if path.exists():
            return path, handle
        os.close(handle)


def _new_file(prefix: str, dir: Path) -> str:
    handle, name = tempfile.mkstemp(prefix=prefix, dir=dir)
    os.close(handle)
    return name


@contextlib.contextmanager
def _only_lock(path: Path) -> Iterator[bool]:
    """Whether no process holds the lock of a file or folder, which this one then holds."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe of such a name would block
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def lock(folder: str | os.PathLike) -> Any:
    """Acquire and return a lock on `folder`; call `.release()` to release it.

    The kernel releases it when the process ends for any reason. Within one process, locks on the same folder do not
    exclude each other. Raises UserError if another process holds the lock, or if no file can be locked, and OSError if
    the folder is not writable.
    """
    from filelock import FileLock, Timeout

    check_no_url(folder)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_regular(folder / LOCK)
    folder_lock = FileLock(folder / LOCK, timeout=0, is_singleton=True, thread_local=False)
    try:
        folder_lock.acquire()
    except Timeout:
        raise UserError(f"another process is using {folder}: wait for it to finish, or use another folder") from None
    return folder_lock


LOCK = "run.lock"
"""The lock file in a folder. It is never deleted, since all processes must lock the same file."""
