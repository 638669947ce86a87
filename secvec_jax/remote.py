"""Files in object stores, by URL: gs://BUCKET/PATH, s3://, az://, read and written through fsspec. Imports no JAX.

Files that are read are copied into the cache once, as long as the store reports them unchanged. Only finished models
are written: a run directory needs locks, renames and appended lines, which object stores do not have.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from secvec_jax.assets import cache_dir
from secvec_jax.errors import UserError
from secvec_jax.files import atomic_file, atomic_folder, expanded

SCHEMES = ("gs", "gcs", "s3", "az", "abfs", "memory")
"""What URLs can begin with; `memory` is for tests."""

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def is_url(name: Any) -> bool:
    """Whether a name is a URL of an object store."""
    match = _URL.match(str(name))
    return match is not None and match[1].lower() in SCHEMES


def local(name: str | os.PathLike[str]) -> Path:
    """The path of what is to be read: a copy of what a URL names, or the path itself with ~ expanded.

    Raises UserError if nothing is there, or if it cannot be read.
    """
    return fetched(str(name)) if is_url(name) else expanded(name)


def fetched(url: str) -> Path:
    """A copy of the file or folder at a URL in the cache, updated when the store has another version of it."""
    system, root = _opened(url)
    try:
        files = {root: system.info(root)} if system.isfile(root) else system.find(root, detail=True)
        files = {name: info for name, info in files.items() if info.get("type") != "directory" and name[-1] != "/"}
        versions = {name: system.ukey(name) for name in sorted(files)}
        if not files:
            raise UserError(f"there is no file at {url}: check the URL")
        key = hashlib.sha256(json.dumps([url, versions]).encode()).hexdigest()[:16]
        target = cache_dir() / "remote" / key / (root.rstrip("/").rpartition("/")[2] or "root")
        if target.exists():
            return target
        if root in files:
            with atomic_file(target, mode=0o600) as staging:
                system.get_file(root, str(staging))
        else:
            with atomic_folder(target, mode=0o700) as folder:
                for name in files:
                    path = folder / name[len(root) :].lstrip("/")
                    if ".." in path.parts:
                        raise UserError(f"{url} has a file named {name}: rename it")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    system.get_file(name, str(path))
    except UserError:
        raise
    except Exception as error:  # each store has its own exceptions
        raise UserError(f"cannot read {url} ({_reason(error)}): check the URL and your access to it") from error
    return target


def upload(folder: Path, url: str) -> None:
    """Write all files of a model's folder to a URL, config.json last, since a model without it is incomplete.

    Files at the URL that the folder does not have are left as they are. Raises UserError if it cannot be written.
    """
    system, root = _opened(url)
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name == "config.json")
    try:
        for path in files:
            target = f"{root.rstrip('/')}/{path.relative_to(folder).as_posix()}"
            system.makedirs(target.rpartition("/")[0], exist_ok=True)
            system.put_file(str(path), target)
    except Exception as error:
        raise UserError(f"cannot write {url} ({_reason(error)}): check the URL and your access to it") from error


def exists(url: str) -> bool:
    """Whether there is anything at a URL. Raises UserError if the store cannot be asked."""
    system, root = _opened(url)
    try:
        return bool(system.exists(root))
    except Exception as error:
        raise UserError(f"cannot read {url} ({_reason(error)}): check the URL and your access to it") from error


def _opened(url: str) -> tuple[Any, str]:
    """The store of a URL, and the path in it. Raises UserError without the package that the store needs."""
    import fsspec

    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:
        package = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs"}
        scheme = url.partition(":")[0].lower()
        raise UserError(f"{url} needs another package: pip install {package.get(scheme, 'fsspec')}") from error
    except Exception as error:
        raise UserError(f"{url} is not a URL that can be read ({_reason(error)}): write gs://BUCKET/PATH") from error


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
