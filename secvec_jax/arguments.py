"""Checks of what a caller passes to the public functions, made before any work begins.

Each check returns the value in the form that the code uses, or raises UserError with the name of the argument, what
was passed and what to pass instead. What the checks accept is what Python and NumPy call an integer, a number or a
path; `True` is none of them.
"""

import math
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from secvec_jax.errors import UserError

Value = TypeVar("Value")


def shown(value: Any) -> str:
    """The value in a few words for an error message: itself if it is short, else its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, bool | int | float | str | os.PathLike):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """An integer of at least `least` and at most `most`; a float is refused even if it has no fraction."""
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None:
        raise UserError(f"{name} is {shown(value)}: pass an integer")
    if least is not None and whole < least:
        raise UserError(f"{name} is {whole}: it must be at least {least}")
    if most is not None and whole > most:
        raise UserError(f"{name} is {whole}: it must be at most {most}")
    return whole


def number(name: str, value: Any, least: float | None = None) -> float:
    """A finite number of at least `least`."""
    try:
        real = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        real = math.nan
    if not math.isfinite(real):
        raise UserError(f"{name} is {shown(value)}: pass a finite number")
    if least is not None and real < least:
        raise UserError(f"{name} is {real:g}: it must be at least {least:g}")
    return real


def path(name: str, value: Any, what: str = "the path of a file or folder") -> Path:
    """A path, with ~ expanded. An empty string is refused: as a path it would mean the current folder."""
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes) or not str(value).strip():
        raise UserError(f"{name} is {shown(value)}: pass {what}")
    if "\0" in str(value):
        raise UserError(f"{name} is {shown(value)}: a path cannot contain a null character")
    return Path(value).expanduser()


def instance(name: str, value: Any, kinds: type[Value] | tuple[type[Value], ...], fix: str) -> Value:
    """The value if it is of one of the kinds; `fix` completes the message, as in "pass sv.LoRA(rank=8)"."""
    if not isinstance(value, kinds):
        raise UserError(f"{name} is {shown(value)}: {fix}")
    return value


def callback(name: str, value: Any) -> Callable[..., Any]:
    """A function."""
    if not callable(value):
        raise UserError(f"{name} is {shown(value)}: pass a function")
    return value
