"""The console that all output of the verbs goes through: what is printed is text, never markup or escape sequences."""

import contextlib
import io
import os
import sys
from collections.abc import Iterable
from typing import Any

import rich.console
from rich.segment import Segment

from secvec_jax.arguments import whole_number
from secvec_jax.printable import printable


class Console(rich.console.Console):
    """rich's console without markup in texts, and with the control characters in them shown as visible escapes.

    Styles are given as arguments (`print(text, style="dim")`).
    """

    def __init__(self, **options: Any):
        # rich would raise an error for a size such as "²".
        environment = {name: value for name, value in os.environ.items() if name not in _SIZES or _is_size(value)}
        super().__init__(markup=False, highlight=False, emoji=False, _environ=environment, **options)

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        """Return rich's segments; those of text are printable, and those that move the cursor are rich's own."""
        for text, style, control in super().render(*arguments, **options):
            yield Segment(text if control else printable(text, keep="\n"), style, control)


_SIZES = ("COLUMNS", "LINES", "JUPYTER_COLUMNS", "JUPYTER_LINES")
"""Variables of the environment that say how large the terminal is."""


def _is_size(text: str) -> bool:
    size = whole_number(text)
    return size is not None and 0 < size < 10_000


def open_standard_streams() -> None:
    """Open the null device in place of each standard stream that is closed.

    A file that a command opens would otherwise take its number, and what libraries log would be written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))


def print_any_character() -> None:
    """Let the standard output take characters that its encoding lacks, escaped, in place of raising an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(OSError):  # it is flushed first, which fails if nothing can be written
            sys.stdout.reconfigure(errors="backslashreplace")
