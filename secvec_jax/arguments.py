"""Checks of the paths, objects and functions that a caller passes to the public functions, made before any work begins.

Each check returns the value in the form that the code uses, or raises UserError with the name of the argument, what
was passed and what to pass instead. Settings and numbers are checked by `checks`.
"""

import errno
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from secvec_jax.errors import UserError
from secvec_jax.files import expanded

Value = TypeVar("Value")


def shown(value: Any) -> str:
    """A short description of the value for error messages: the value itself if it is short, else its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, bool | int | float | str | os.PathLike):
        if isinstance(value, int) and value.bit_length() > 1024:
            return f"a whole number of {value.bit_length():,} bits"
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def whole_number(text: str) -> int | None:
    """The number that a text of at most nine decimal digits is; None for any other text.

    `str.isdigit` also holds for texts that `int` refuses, such as "²" and thousands of digits.
    """
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


def path(name: str, value: Any, what: str = "the path of a file or folder") -> Path:
    """A path, with ~ expanded. An empty string is refused, since as a path it means the current folder."""
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes) or not str(value).strip():
        raise UserError(f"{name} is {shown(value)}: pass {what}")
    if "\0" in str(value):
        raise UserError(f"{name} is {shown(value)}: a path cannot contain a null character")
    expanded_path = expanded(value)
    try:
        expanded_path.exists()
    except OSError as error:  # whoever reads it reports any other error
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{name} is {shown(value)}: the name is too long for a file") from None
    return expanded_path


def instance(name: str, value: Any, kinds: type[Value] | tuple[type[Value], ...], fix: str) -> Value:
    """The value if it is an instance of one of the types; `fix` completes the message: "pass sv.LoRA(rank=8)"."""
    if not isinstance(value, kinds):
        raise UserError(f"{name} is {shown(value)}: {fix}")
    return value


def check_distinct(values: Iterable[Any]) -> None:
    """Raise UserError if the same thing, such as a file of rows or of vectors, is named twice: it would count twice."""
    seen: list[Any] = []
    names: set[str] = set()
    for value in values:
        if isinstance(value, str | os.PathLike):
            spellings = {str(value), str(_existing(value) or value)}
            twice = not names.isdisjoint(spellings)
            names |= spellings
        else:
            twice = any(value is other for other in seen)
            seen.append(value)
        if twice:
            raise UserError(f"{shown(value)} is given twice, and would count twice: give each once")


def _existing(name: Any) -> Path | None:
    """The file or folder of this name without links; None if there is none, as for a packaged name."""
    try:
        found = expanded(name)
        return found.resolve() if found.exists() else None
    except (OSError, RuntimeError, ValueError, UserError):
        return None


def callback(name: str, value: Any) -> Callable[..., Any]:
    """A function."""
    if not callable(value):
        raise UserError(f"{name} is {shown(value)}: pass a function")
    return value
