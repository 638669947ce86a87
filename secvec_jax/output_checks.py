"""Checks, before anything is written, that no other files are replaced, deleted or mixed with the output."""

import fnmatch
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from secvec_jax.errors import UserError
from secvec_jax.files import is_unfinished, resolved


def check_replaceable(target: Path, mark: str | None = None, holds: Sequence[str] = ("*",)) -> None:
    """Raise UserError if writing `target` would replace something of a different kind.

    mark: the name of a file that every folder of this kind contains; None if `target` is to be a file. holds: patterns
    of the names that such a folder may contain; with any other it is not replaced.
    """
    if mark is None:
        if target.is_dir():
            raise UserError(f"{target} is a folder: name a file to write")
        return
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: name a folder to write into")
    if resolved(target) in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{target} is the current folder or one of its parents: name a folder inside it")
    if not target.is_dir():
        return
    names = sorted(path.name for path in target.iterdir())
    others = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in holds)]
    if others or (names and mark not in names):
        name = (others or names)[0]
        raise UserError(f"{target} contains other files ({name}), which would be deleted: name a new or empty folder")


def check_own(folder: Path, marks: Iterable[str]) -> None:
    """Raise UserError if a folder has contents that this library did not write: none of the `marks`.

    marks: names of files or folders. Unfinished files of killed processes do not count as contents.
    """
    if not folder.is_dir() or any((folder / mark).exists() for mark in marks):
        return
    others = sorted(path.name for path in folder.iterdir() if not is_unfinished(path.name))
    if others:
        raise UserError(
            f"{folder} contains files that no run of this library wrote ({others[0]}): name a new or empty folder"
        )


def check_kept(folder: str | os.PathLike, flag: str, inputs: Mapping[str, str | os.PathLike]) -> None:
    """Raise UserError if a folder that is to be replaced is one of the inputs, or holds one.

    flag: that of the folder. inputs: flag -> path; missing paths are ignored.
    """
    target = resolved(folder)
    for name, path in inputs.items():
        source = resolved(path)
        if source.exists() and source.is_relative_to(target):
            raise UserError(f"{flag} {folder} would replace what {name} {path} names: give another folder")


def check_separate(output: str | os.PathLike, flag: str, inputs: Mapping[str, str | os.PathLike]) -> None:
    """Raise UserError if a file that is to be written is one of the inputs, or is inside one.

    flag: that of the output. inputs: flag -> path; missing paths are ignored.
    """
    target = resolved(output)
    for name, path in inputs.items():
        source = resolved(path)
        if not source.exists():
            continue
        is_same = target.exists() and os.path.samefile(target, source)
        if is_same or (source.is_dir() and target.is_relative_to(source)):
            raise UserError(f"{flag} {output} would overwrite what {name} {path} names: give another path")
