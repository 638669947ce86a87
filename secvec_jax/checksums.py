"""Checksums of a folder's files, stored with them, which find bits that have flipped since they were written."""

import json
from pathlib import Path

import xxhash

from secvec_jax.errors import UserError
from secvec_jax.files import check_regular

FILE = "checksums.json"
_BLOCK = 2**22


def write_checksums(folder: Path) -> None:
    """Write the checksums of the files in `folder` into it, when all else is written; cards may be edited later."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md" and path.name != FILE)
    checksums = {path.relative_to(folder).as_posix(): _checksum(path) for path in paths}
    (folder / FILE).write_text(json.dumps(checksums, indent=2) + "\n", encoding="utf-8")


def changed_file(folder: Path) -> Path | None:
    """The first file of `folder` that differs from its checksum; None if none does, or if there are no checksums.

    A file that is missing is not counted: whoever needs it knows what it is for. Raises UserError if the checksums or
    one of the files cannot be read.
    """
    path = folder / FILE
    check_regular(path, max_bytes=2**24)
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error
    except ValueError:
        return path
    try:
        checksums = json.loads(text)
        for name, checksum in checksums.items():
            if name.startswith("/") or ".." in name.split("/"):
                return path
            check_regular(folder / name)
            if (folder / name).is_file() and _checksum(folder / name) != checksum:
                return folder / name
    except UserError:
        raise
    except (ValueError, AttributeError, TypeError, RecursionError):
        return path
    return None


def check_folder(folder: Path) -> None:
    """Raise UserError if a file of `folder` differs from its checksum."""
    changed = changed_file(folder)
    if changed is not None:
        raise UserError(
            f"{changed} has changed since it was written, its checksum differs: delete {folder} and make it again, or "
            f"delete {folder / FILE} if you changed the file on purpose"
        )


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error
    return f"xxh3-128:{digest.hexdigest()}"
